package main

import (
	"context"
	"log/slog"

	"meshupd/install"
	"meshupd/install/apply"
	"meshupd/peer"
	"meshupd/verify"
)

// installer is the half of a device that writes slots and starts them. Here it is part of the daemon; everything that
// needs the rights to do so goes through it.
type installer interface {
	install.Slots
	// Start does what a power-on has left to do; it is called once, before anything else.
	Start(ctx context.Context) error
	// Check proves the slot that runs healthy, or says why not (E-HEALTH).
	Check(ctx context.Context, slot install.SlotName, version string) error
	// straight is how pieces land in the idle slot, or nil where this process may not write slots.
	straight() peer.Straight
	// wrote says what the last write of a slot cost; nil: nobody counts.
	wrote() func() (written, same int64)
	// Restore fills the idle slot with a version that is kept beside the slots (E-NOT-FOUND), in the place of Write.
	Restore(ctx context.Context, release verify.Digest) error
	// learn tells of a release that was accepted, should this half be taken over later.
	learn(ctx context.Context, rel *verify.Release) error
}

// localInstaller does it in this process.
type localInstaller struct {
	startedSlots
	health install.Health
}

func (l localInstaller) straight() peer.Straight {
	s, ok := l.bare().(peer.Straight)
	if hooked, has := l.startedSlots.(*install.Hooked); ok && has {
		return hookedStraight{s, hooked}
	}
	return s
}

// bare are the slots without the hooks.
func (l localInstaller) bare() startedSlots {
	if hooked, ok := l.startedSlots.(*install.Hooked); ok {
		return hooked.Inner()
	}
	return l.startedSlots
}

// hookedStraight asks pre-install before the first piece changes the slot: that is when the version in it is lost.
type hookedStraight struct {
	peer.Straight
	hooked *install.Hooked
}

func (h hookedStraight) OpenIdle(ctx context.Context, img verify.Image) (*install.IdleSlot, error) {
	if err := h.hooked.PreInstall(ctx, verify.Digest{}, ""); err != nil {
		return nil, err
	}
	return h.Straight.OpenIdle(ctx, img)
}

func (h hookedStraight) Adopt(ctx context.Context, rel *verify.Release, images []verify.Image, progress func(done, total int64)) error {
	return h.hooked.Install(ctx, rel, func() error { return h.Straight.Adopt(ctx, rel, images, progress) })
}

func (l localInstaller) wrote() func() (written, same int64) {
	if block, ok := l.bare().(*install.Block); ok {
		return block.Wrote
	}
	return nil
}

// learn has nobody to tell: the door is the same. What the publisher withdraws is not kept any longer.
func (l localInstaller) learn(ctx context.Context, rel *verify.Release) error {
	return l.Forsake(ctx, rel.Manifest().Recalls)
}

// Forsake drops the kept versions that the digests name, as manifests or images.
func (l localInstaller) Forsake(_ context.Context, recalls []verify.Digest) error {
	if files, ok := l.bare().(*install.Files); ok {
		return files.Forsake(recalls)
	}
	return nil
}

func (l localInstaller) Restore(ctx context.Context, release verify.Digest) error {
	files, ok := l.bare().(*install.Files)
	if !ok {
		return verify.Refuse(verify.CodeNotFound, "these slots keep no versions")
	}
	return files.Restore(ctx, release)
}

func (l localInstaller) Check(ctx context.Context, slot install.SlotName, version string) error {
	check := l.health.For(slot, version)
	if containers, ok := l.bare().(*install.Containers); ok {
		check.Env = containers.Env(slot)
	}
	if watching, ok := l.bare().(watched); ok {
		return watching.Check(ctx, slot, check.Check)
	}
	return check.Check(ctx)
}

// watched are slots whose application can be seen to end while check still runs.
type watched interface {
	Check(ctx context.Context, slot install.SlotName, check func(context.Context) error) error
}

func openInstaller(ctx context.Context, cfg Config, log *slog.Logger) (installer, error) {
	if cfg.Apply.Socket != "" {
		return remoteInstaller{apply.NewClient(cfg.Apply.Socket)}, nil
	}
	slots, err := openSlots(ctx, cfg, log)
	if err != nil {
		return nil, err
	}
	return localInstaller{slots, cfg.health()}, nil
}
