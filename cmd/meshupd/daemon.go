package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"path"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"meshupd/cmd/meshupd/internal/control"
	"meshupd/discovery"
	"meshupd/peer"
	"meshupd/verify"
	"meshupd/verify/durable"
)

// memoryLimit is where the collector begins to work harder: a daemon that is
// idle most of its life must not keep what one transfer made it grow to.
const memoryLimit = 48 << 20

// runDaemon wires the rooms together and runs until ctx ends.
func runDaemon(ctx context.Context, cfg Config, log *slog.Logger) error {
	debug.SetGCPercent(50)
	debug.SetMemoryLimit(memoryLimit)
	states := newStateHook(cfg, log)
	var node *peer.Node
	err := extending(saySystemd, func() (err error) {
		node, err = openNode(ctx, cfg, states.changed, log)
		return err
	})
	if err != nil {
		return err
	}
	if err := durable.MkdirAll(cfg.Run, 0o755); err != nil {
		return fmt.Errorf("make the run folder: %w", err)
	}
	makeInhibitDir(cfg.Policy.InhibitDir, log)
	ln, err := control.Listen(cfg.Socket())
	if err != nil {
		return err
	}
	server := control.NewServer(control.ServerConfig{Backend: backend{node}, Version: buildVersion(), Log: log})
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return node.Run(ctx) })
	g.Go(func() error { return server.Serve(ctx, ln) })
	g.Go(func() error { return states.run(ctx) })
	g.Go(func() error { return writeState(ctx, node, filepath.Join(cfg.Run, "state")) })
	g.Go(func() error { return newGuard(node.Alive, log).run(ctx) })
	log.Info("started", "name", cfg.Name, "product", cfg.Product, "id", node.ID(), "socket", cfg.Socket())
	err = g.Wait()
	if errors.Is(err, context.Canceled) {
		err = nil
	}
	log.Info("stopped", "err", err)
	return err
}

func openNode(ctx context.Context, cfg Config, changed func(peer.DeviceStatus), log *slog.Logger) (*peer.Node, error) {
	inst, err := openInstaller(ctx, cfg, log)
	if err != nil {
		return nil, err
	}
	pcfg, err := nodeConfig(cfg, inst, log)
	if err != nil {
		return nil, err
	}
	pcfg.StateChanged = changed
	return peer.New(pcfg)
}

var policies = map[string]peer.Policy{
	"off": peer.PolicyOff, "check": peer.PolicyOff, "fetch": peer.PolicyFetch, "install": peer.PolicyInstall,
}

func nodeConfig(cfg Config, inst installer, log *slog.Logger) (peer.Config, error) {
	key, err := siteKey(cfg.Mesh.SiteKeyFile)
	if err != nil {
		return peer.Config{}, err
	}
	var straight peer.Straight
	if cfg.Store.Straight {
		if straight = inst.straight(); straight == nil {
			return peer.Config{}, verify.Refuse(verify.CodeConfig, "store.straight: this process may not write the slots itself")
		}
	}
	return peer.Config{
		Name: cfg.Name, Product: cfg.Product, Hardware: cfg.Hardware, Channel: cfg.Channel,
		BuildTime: buildTime(), Meshupd: buildVersion().Version,
		StateDir: cfg.State, Anchor: cfg.Trust, Reserve: int64(cfg.Store.Reserve), Relay: int64(cfg.Store.Relay),
		Slots: inst, Straight: straight, Wrote: inst.wrote(), Takes: cfg.Slots.takes(), Starter: inst.Start, Learn: inst.learn, Restore: inst.Restore, Health: inst.Check, Quiet: cfg.quiet,
		Policy: policies[cfg.Policy.Auto], Hold: (&holder{policy: cfg.Policy, log: log}).hold, SiteKey: key,
		ListenNow: func() []netip.AddrPort { return listenAddrs(cfg.Mesh) },
		Finders:   func(ad discovery.Advert) []peer.Finder { return finders(cfg.Mesh, ad, log) },
		MaxPeers:  cfg.Mesh.MaxPeers, UpLimit: int64(cfg.Limits.Upload), DownLimit: int64(cfg.Limits.Download),
		Log: log,
	}, nil
}

// maxSiteKey is far above any sensible secret, and keeps a wrong path from being read whole.
const maxSiteKey = 4 << 10

func siteKey(file string) ([]byte, error) {
	if file == "" {
		return nil, nil
	}
	raw, err := readFileMax(file, maxSiteKey)
	if err != nil {
		return nil, verify.Refuse(verify.CodeConfig, "read the site key: %w", err)
	}
	return parseSiteKey(file, raw)
}

func parseSiteKey(file string, raw []byte) ([]byte, error) {
	key := []byte(strings.TrimSpace(string(raw)))
	if len(key) < 16 {
		return nil, verify.Refuse(verify.CodeConfig, "the site key in %s has %d bytes, fewer than 16", file, len(key))
	}
	return key, nil
}

// interfacesOf lists the interfaces that the config chooses, now.
func interfacesOf(patterns []string) []net.Interface {
	all, err := net.Interfaces()
	if err != nil {
		return nil
	}
	return slices.DeleteFunc(all, func(i net.Interface) bool { return !chosen(i, patterns) })
}

func chosen(i net.Interface, patterns []string) bool {
	if i.Flags&net.FlagUp == 0 {
		return false
	}
	if len(patterns) == 0 {
		return i.Flags&net.FlagLoopback == 0 && i.Flags&net.FlagMulticast != 0
	}
	return slices.ContainsFunc(patterns, func(p string) bool {
		ok, err := path.Match(p, i.Name)
		return err == nil && ok
	})
}

// privateAddrs are the addresses of these interfaces that may carry the mesh.
func privateAddrs(ifaces []net.Interface) []netip.Addr {
	var out []netip.Addr
	for _, i := range ifaces {
		addrs, err := i.Addrs()
		if err != nil {
			continue
		}
		for _, a := range addrs {
			p, err := netip.ParsePrefix(a.String())
			if err != nil {
				continue
			}
			ip := p.Addr().Unmap()
			if ip.IsLinkLocalUnicast() && ip.Is6() {
				ip = ip.WithZone(i.Name)
			}
			if ip.IsPrivate() || ip.IsLinkLocalUnicast() || ip.IsLoopback() {
				out = append(out, ip)
			}
		}
	}
	return out
}

// listenAddrs are the addresses to bind now: those of the config, or the private
// ones of its interfaces, so that nothing is offered on an address that faces the internet.
func listenAddrs(cfg MeshConfig) []netip.AddrPort {
	addrs := make([]netip.Addr, 0, len(cfg.Listen))
	for _, text := range cfg.Listen {
		if addr, err := netip.ParseAddr(text); err == nil { // Validate has refused anything else
			addrs = append(addrs, addr)
		}
	}
	if len(addrs) == 0 {
		addrs = privateAddrs(interfacesOf(cfg.Interfaces))
	}
	var out []netip.AddrPort
	for _, addr := range addrs {
		out = append(out, netip.AddrPortFrom(addr, uint16(cfg.Port)))
	}
	return out
}

func finders(cfg MeshConfig, ad discovery.Advert, log *slog.Logger) []peer.Finder {
	var out []peer.Finder
	if cfg.MDNS {
		out = append(out, &discovery.MDNS{
			Interfaces: func() []string {
				var names []string
				for _, i := range interfacesOf(cfg.Interfaces) {
					names = append(names, i.Name)
				}
				return names
			},
			Advert: ad, Log: log,
		})
	}
	if len(cfg.Seeds) > 0 {
		out = append(out, &discovery.Static{Seeds: cfg.Seeds, Log: log})
	}
	return out
}

// writeState keeps one word for scripts in path. It is no record: after a cut the next start writes it anew.
func writeState(ctx context.Context, node *peer.Node, path string) error {
	last := ""
	for {
		changed := node.Changed()
		if now := node.Site().Devices[0].Status.State; now != last {
			if err := durable.WriteFile(path, []byte(now+"\n"), 0o644); err != nil {
				return fmt.Errorf("write the state for scripts: %w", err)
			}
			last = now
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changed:
		}
		timer := time.NewTimer(500 * time.Millisecond)
		select {
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		case <-timer.C:
		}
	}
}
