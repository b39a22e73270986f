// Package doctor runs checks that find what would make an update fail later, and reads what such checks look at: a tree of
// files that may be the root of an image, and the small files of a system in it.
//
// Nothing of a tree is run, changed or believed: names are resolved inside it, sizes and counts are bounded, and only regular
// files are opened. What a finding means for the device is decided by whoever writes the check.
package doctor

import (
	"context"
	"fmt"
	"time"

	"meshupd/verify"
)

// Level says how bad a finding is.
type Level string

// The levels.
const (
	LevelOK      Level = "ok"
	LevelWarning Level = "warning" // an update can work, but something is missing that one would want
	LevelError   Level = "error"   // an update will fail, or cannot be trusted
	LevelSkipped Level = "skipped" // not looked at; Detail says why
)

// Finding is what came of one check.
type Finding struct {
	ID     string      `json:"id"` // stable, as "slots.idle"
	Level  Level       `json:"level"`
	Detail string      `json:"detail"`         // what was found
	Why    string      `json:"why,omitempty"`  // what will come of it
	Fix    string      `json:"fix,omitempty"`  // what to do
	Code   verify.Code `json:"code,omitempty"` // with which an update would be refused
	// Beside is a check that has nothing to look at here, or none yet: not worth a line.
	Beside bool `json:"-"`
}

// OK is a finding that there is nothing to do.
func OK(format string, args ...any) Finding {
	return Finding{Level: LevelOK, Detail: fmt.Sprintf(format, args...)}
}

// Warn is a finding that an update can live with.
func Warn(detail, why, fix string) Finding {
	return Finding{Level: LevelWarning, Detail: detail, Why: why, Fix: fix}
}

// Fail is a finding that an update cannot live with.
func Fail(detail, why, fix string) Finding {
	return Finding{Level: LevelError, Detail: detail, Why: why, Fix: fix}
}

// Skip is a check that could not be made.
func Skip(format string, args ...any) Finding {
	return Finding{Level: LevelSkipped, Detail: fmt.Sprintf(format, args...)}
}

// With adds the code of an error, if it has one.
func (f Finding) With(err error) Finding {
	f.Code = verify.CodeOf(err)
	return f
}

// Check is one thing to look at, on a subject of type S.
type Check[S any] struct {
	ID string
	// Needs says why the check cannot be made on this subject, or "". Nil: it always can.
	Needs func(S) string
	// Slow checks have no limit but that of ctx.
	Slow bool
	Look func(s S, ctx context.Context) Finding // the shape of a method of S
}

// patience bounds one check: whatever hangs must not keep the others from being told.
const patience = 20 * time.Second

// Run makes the checks one after the other and tells of each. It stops only when ctx ends.
func Run[S any](ctx context.Context, s S, checks []Check[S], tell func(Finding)) error {
	for _, c := range checks {
		if err := ctx.Err(); err != nil {
			return err
		}
		f := c.run(ctx, s)
		f.ID = c.ID
		tell(f)
	}
	return nil
}

func (c Check[S]) run(ctx context.Context, s S) Finding {
	if c.Needs != nil {
		if why := c.Needs(s); why != "" {
			f := Skip("%s", why)
			f.Beside = true
			return f
		}
	}
	if c.Slow {
		return c.Look(s, ctx)
	}
	limited, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	return c.Look(s, limited)
}

// Counts sums findings up.
type Counts struct {
	OK       int `json:"ok"`
	Warnings int `json:"warnings"`
	Errors   int `json:"errors"`
	Skipped  int `json:"skipped"`
}

// Add counts one more.
func (c *Counts) Add(f Finding) {
	switch f.Level {
	case LevelOK:
		c.OK++
	case LevelWarning:
		c.Warnings++
	case LevelError:
		c.Errors++
	case LevelSkipped:
		c.Skipped++
	}
}
