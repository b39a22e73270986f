package control

import (
	"context"
	"fmt"
	"io"

	"meshupd/verify"
)

// Who is a local caller, as the kernel vouches for it.
type Who struct {
	UID, GID uint32
	PID      int32
	Name     string // user name, if the system knows one
}

// String names the caller for history and log: "anna (uid 1000)".
func (w Who) String() string {
	if w.Name == "" {
		return fmt.Sprintf("uid %d", w.UID)
	}
	return fmt.Sprintf("%s (uid %d)", w.Name, w.UID)
}

// Viewer is the part of the daemon that anyone may ask.
type Viewer interface {
	// Status computes the site's present state. Schema, Generation and Counts may be left empty.
	Status(ctx context.Context) (SiteStatus, error)
	// History lists the newest events, newest first; device is a name or an id, or "" for all.
	History(ctx context.Context, device string, limit int) ([]Event, error)
	// Watch yields a value whenever Status would answer differently (several changes may yield one), until ctx ends.
	Watch(ctx context.Context) <-chan struct{}
}

// Actor is the part of the daemon that changes something. Errors are Refusals.
type Actor interface {
	// OpenImport checks a head: signatures, product, hardware, channel, order, space. It changes nothing that would
	// refuse another release afterwards: that is Commit's part.
	OpenImport(ctx context.Context, head *verify.UnverifiedHead, by Who) (Import, error)
	// Rollback starts the version before the present one again, or, with a version, one that is kept beside the slots.
	Rollback(ctx context.Context, by Who, to string) error
}

// Backend is what the daemon implements.
type Backend interface {
	Viewer
	Actor
}

// Import takes the images of one release in. Its methods are never called concurrently.
type Import interface {
	// Info describes the release and its images.
	Info() ImportInfo
	// Put stores one image from exactly its signed number of bytes. On an error nothing of it is left.
	Put(ctx context.Context, digest verify.Digest, r io.Reader) error
	// Commit accepts the release when every wanted image is held, and offers it to the site.
	Commit(ctx context.Context) error
	// Abort gives up; images that are whole may stay in the store. It is not called after a Commit that returned nil.
	Abort()
}
