// Package install puts a verified image where the device boots or runs it from,
// tries it, and knows what failed here.
//
// It takes images only from the store, by a verify.Release, and hashes them
// again while it writes. It does not decide when to do what: peer's lifecycle does.
package install
