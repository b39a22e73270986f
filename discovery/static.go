package discovery

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"time"
)

// Static yields configured seeds, again from time to time.
type Static struct {
	Seeds []string // host:port, IP or name
	Log   *slog.Logger
}

const (
	maxSeeds     = 64
	seedAgain    = time.Minute // between two looks at a seed
	seedRetryMin = 2 * time.Second
	seedRetryMax = 5 * time.Minute
	seedTimeout  = 10 * time.Second // for one name
)

// CheckSeed says whether a seed can be used, for the reader of a configuration.
func CheckSeed(seed string) error {
	_, _, err := splitSeed(seed)
	return err
}

func splitSeed(seed string) (host string, port uint16, err error) {
	host, text, err := net.SplitHostPort(seed)
	if err != nil {
		return "", 0, fmt.Errorf("the seed %q is not host:port", seed)
	}
	n, err := strconv.ParseUint(text, 10, 16)
	if err != nil || n == 0 || host == "" {
		return "", 0, fmt.Errorf("the seed %q is not host:port", seed)
	}
	return host, uint16(n), nil
}

// Run resolves and yields the seeds until ctx ends; found may be called from several goroutines.
func (s *Static) Run(ctx context.Context, found func(Hint)) error {
	if s.Log == nil {
		s.Log = slog.New(slog.DiscardHandler)
	}
	if len(s.Seeds) > maxSeeds {
		return fmt.Errorf("%d seeds are configured; at most %d are used", len(s.Seeds), maxSeeds)
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	for _, seed := range s.Seeds {
		host, port, err := splitSeed(seed)
		if err != nil {
			return err
		}
		wg.Go(func() { s.follow(ctx, seed, host, port, found) })
	}
	return nil
}

// follow looks up one seed again and again: its device may get another address.
func (s *Static) follow(ctx context.Context, seed, host string, port uint16, found func(Hint)) {
	fails := 0
	for {
		addrs, err := lookup(ctx, host)
		wait := seedAgain
		if err == nil {
			fails = 0
			h := Hint{Via: "seed"}
			for _, a := range addrs[:min(len(addrs), maxAddrs)] {
				h.Addrs = append(h.Addrs, netip.AddrPortFrom(a.Unmap(), port))
			}
			found(h)
		} else {
			if fails == 0 && ctx.Err() == nil {
				s.Log.Warn("a seed has no address", "seed", seed, "why", err.Error())
			}
			wait = min(seedRetryMin<<min(fails, 10), seedRetryMax)
			fails++
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait - wait/4 + rand.N(wait/2)):
		}
	}
}

func lookup(ctx context.Context, host string) ([]netip.Addr, error) {
	if a, err := netip.ParseAddr(host); err == nil {
		return []netip.Addr{a}, nil
	}
	ctx, cancel := context.WithTimeout(ctx, seedTimeout)
	defer cancel()
	return net.DefaultResolver.LookupNetIP(ctx, "ip", host)
}
