// Package publish is a publisher's bench: it makes keys, the first trust
// document, release folders, signatures and .update files.
//
// It writes the formats that verify reads and decides nothing about belief: what
// it makes is checked by the same Door that every device has. Secret keys are in
// memory only between LoadSecretKey and the end of the program; whoever keeps
// them offline signs manifest.json with gpg and hands the result to AddSignature.
package publish
