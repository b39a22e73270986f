// Package simnet makes local networks to try meshupd on: sites that are not there.
//
// There are two kinds. A Site (site.go) is real: processes in network namespaces
// of their own, on a bridge, over links shaped to a bandwidth; the kernel's TCP
// and multicast, no root needed where user namespaces are allowed. A LAN (lan.go)
// is memory: connections that behave like TCP, scheduled in whatever time the
// caller lives in, so that a testing/synctest bubble runs a site of whole devices
// through hours within seconds.
//
// simnet promises shape, not physics: no packet loss, no reordering, no Wi-Fi. It
// imports nothing else of this module and knows nothing of the testing package.
// A Site needs Linux; it never touches the network of the machine it runs on.
package simnet
