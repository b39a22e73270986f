package simnet

import (
	"errors"
	"fmt"
	"math"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// shape limits what leaves link to bitsPerSec, counted as the kernel counts:
// Ethernet frames without preamble, so that TCP over an MTU of 1500 carries
// 1448 of 1514 bytes. 0 takes the limit away. It may be called again at any time.
func shape(nl *netlink.Handle, link netlink.Link, bitsPerSec int64) error {
	if bitsPerSec < 0 {
		return fmt.Errorf("shape %s: negative rate", link.Attrs().Name)
	}
	tbf := &netlink.Tbf{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: link.Attrs().Index,
		Handle:    netlink.MakeHandle(1, 0),
		Parent:    netlink.HANDLE_ROOT,
	}}
	if bitsPerSec == 0 {
		if err := nl.QdiscDel(tbf); err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("unshape %s: %w", link.Attrs().Name, err)
		}
		return nil
	}
	b := bucketFor(bitsPerSec)
	tbf.Rate = b.rate
	tbf.Buffer = netlink.Xmittime(b.rate, b.burst)
	tbf.Limit = b.limit
	if err := nl.QdiscReplace(tbf); err != nil {
		return fmt.Errorf("shape %s to %d bit/s: %w", link.Attrs().Name, bitsPerSec, err)
	}
	return nil
}

// bucket is a token bucket (tc-tbf(8)), in bytes and bytes per second.
type bucket struct {
	rate         uint64
	burst, limit uint32
}

// bucketFor picks the smallest bucket that still lets TCP have the whole rate.
func bucketFor(bitsPerSec int64) bucket {
	rate := uint64(max(bitsPerSec/8, 1))
	return bucket{
		rate: rate,
		// A timer of the kernel may be one tick late, 1/250 s on common kernels; a
		// smaller bucket would run over meanwhile and lose rate. Two frames at least:
		// a frame larger than the bucket is dropped.
		burst: uint32(min(max(rate/250, 2*1514), math.MaxInt32)),
		// The queue before the bucket: 50 ms, as in a plain switch or modem. Less
		// makes TCP lose rate at every drop, more only adds delay. It must hold
		// the largest burst a sender hands over at once, 64 KiB.
		limit: uint32(min(max(rate/20, 2*65536), math.MaxInt32)),
	}
}
