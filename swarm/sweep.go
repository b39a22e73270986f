package swarm

import (
	"fmt"

	"meshupd/verify"
)

// Sweep removes images that none of the releases in keep uses: an import that
// was cut before its release was kept leaves them behind. Call it at start,
// before anything is stored.
func (s *Store) Sweep(keep []*verify.Release) error {
	s.mu.Lock()
	var stray []verify.Digest
	for _, held := range []map[verify.Digest]int64{s.whole, s.partial} {
		for d := range held {
			if !usedBy(keep, d) {
				stray = append(stray, d)
			}
		}
	}
	s.mu.Unlock()
	for _, d := range stray {
		if err := s.dropImage(d); err != nil {
			return codeDisk(fmt.Errorf("sweep image %s: %w", d, err), 0)
		}
		s.cfg.Log.Info("swept an image that no release uses", "image", d)
	}
	return nil
}

func usedBy(keep []*verify.Release, d verify.Digest) bool {
	for _, k := range keep {
		if _, ok := k.Image(d); ok {
			return true
		}
	}
	return false
}
