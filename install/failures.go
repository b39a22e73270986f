package install

import (
	"errors"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"meshupd/verify"
	"meshupd/verify/durable"
)

// Failure is a release that failed on this device, and why.
type Failure struct {
	Release verify.Digest `json:"release"` // ID of the manifest
	Version string        `json:"version"`
	Code    verify.Code   `json:"code"`
	Detail  string        `json:"detail,omitempty"`
	At      time.Time     `json:"at"` // by the device's clock, which may be wrong
}

// Failures is the durable memory of what failed here, so that a device does not try the same release again and again.
// It holds the newest 256. It is safe for concurrent use by one process.
type Failures struct {
	path string

	mu   sync.Mutex // owns:
	list []Failure  // oldest first, at most one of each release
}

const (
	failuresSchema = "meshupd.failures/1"
	maxFailures    = 256
	maxFailureFile = 1 << 20
	maxDetail      = 300 // characters
	maxCode        = 32
)

// OpenFailures reads failed.json in dir; a missing file means that nothing failed. A file that cannot be believed is
// moved to failed.json.bad: then OpenFailures returns an E-FORMAT and also an empty, usable Failures. The caller has to
// tell, because this device may now try again what already failed on it. With other errors (E-IO) Failures is nil.
func OpenFailures(dir string) (*Failures, error) {
	f := &Failures{path: filepath.Join(dir, "failed.json")}
	data, err := readSmall(f.path, maxFailureFile)
	if errors.Is(err, fs.ErrNotExist) {
		return f, nil
	}
	if err != nil {
		return nil, verify.Refuse(verify.CodeIO, "read the failed releases: %w", err)
	}
	list, err := parseFailures(data)
	if err != nil {
		if moved := durable.Rename(f.path, f.path+".bad"); moved != nil {
			return nil, verify.Refuse(verify.CodeIO, "set the damaged list of failed releases aside: %w", moved)
		}
		return f, verify.Refuse(verify.CodeFormat, "the list of failed releases is damaged and was moved to failed.json.bad: %w", err)
	}
	f.list = list
	return f, nil
}

// parseFailures reads what Record wrote. Errors are E-FORMAT.
func parseFailures(data []byte) ([]Failure, error) {
	var list []Failure
	if err := unseal(data, failuresSchema, maxFailureFile, &list); err != nil {
		return nil, err
	}
	if len(list) > maxFailures {
		return nil, verify.Refuse(verify.CodeFormat, "read the failed releases: more than %d", maxFailures)
	}
	seen := make(map[verify.Digest]bool, len(list))
	for _, one := range list {
		if one.Release.IsZero() || seen[one.Release] {
			return nil, verify.Refuse(verify.CodeFormat, "read the failed releases: one has no digest, or a digest comes twice")
		}
		if one.tidy() != one {
			return nil, verify.Refuse(verify.CodeFormat, "read the failed releases: a text is too long or cannot be shown")
		}
		seen[one.Release] = true
	}
	return list, nil
}

// tidy returns the failure as it is kept: texts short and printable, the time in UTC and whole seconds.
func (f Failure) tidy() Failure {
	f.Version = printable(f.Version, maxVersion)
	f.Code = verify.Code(printable(string(f.Code), maxCode))
	f.Detail = strings.TrimSpace(printable(f.Detail, maxDetail))
	f.At = f.At.UTC().Truncate(time.Second)
	return f
}

// Record remembers a failure, durably. A newer failure of the same release takes the place of the older; beyond 256 the
// oldest is dropped. The zero Release is not kept: a factory slot is nothing that could be picked again.
func (f *Failures) Record(one Failure) error {
	if one.Release.IsZero() {
		return nil
	}
	if y := one.At.UTC().Year(); y < 0 || y > 9999 {
		one.At = time.Time{} // no such date has a text form; the failure counts all the same
	}
	one = one.tidy()
	f.mu.Lock()
	defer f.mu.Unlock()
	list := append(without(f.list, one.Release), one)
	return f.save(list[max(0, len(list)-maxFailures):])
}

// Failed tells whether the release failed here.
func (f *Failures) Failed(release verify.Digest) (Failure, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, one := range f.list {
		if one.Release == release {
			return one, true
		}
	}
	return Failure{}, false
}

// All lists the failures, oldest first.
func (f *Failures) All() []Failure {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.list)
}

// Forgive forgets a failure, durably, so that the release may be tried again. A release that did not fail is no error.
func (f *Failures) Forgive(release verify.Digest) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	list := without(f.list, release)
	if len(list) == len(f.list) {
		return nil
	}
	return f.save(list)
}

// save makes the list durable; the memory follows the file, so that both say the same after an error.
func (f *Failures) save(list []Failure) error {
	if list == nil {
		list = []Failure{}
	}
	data, err := seal(failuresSchema, list)
	if err != nil {
		return err
	}
	if err := durable.WriteFile(f.path, data, 0o644); err != nil {
		return verify.Refuse(verify.CodeIO, "save the failed releases: %w", err)
	}
	f.list = list
	return nil
}

func without(list []Failure, release verify.Digest) []Failure {
	return slices.DeleteFunc(slices.Clone(list), func(one Failure) bool { return one.Release == release })
}
