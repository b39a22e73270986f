package peer

import (
	"testing"
)

// everyFact calls f with each combination of facts.
func everyFact(f func(Facts)) {
	for policy := PolicyOff; policy <= PolicyInstall; policy++ {
		for target := TargetNone; target <= TargetRunning; target++ {
			for image := ImageMissing; image <= ImageWhole; image++ {
				for boot := BootSettled; boot <= BootReturned; boot++ {
					for health := HealthUnknown; health <= HealthBad; health++ {
						for bits := range 24 {
							f(Facts{Policy: policy, Target: target, Image: image, Boot: boot, Health: health, Hold: HoldFact(bits >> 3),
								SpaceShort: bits&1 != 0, Idle: bits&2 != 0, Unrecorded: bits&4 != 0})
						}
					}
				}
			}
		}
	}
}

func TestNextNeverTouchesTheUnverified(t *testing.T) {
	n := 0
	everyFact(func(f Facts) {
		n++
		switch step := next(f); step {
		case StepWrite:
			if f.Image != ImageWhole || f.Target != TargetNew || f.Boot != BootSettled || f.Policy != PolicyInstall {
				t.Errorf("writes with %+v", f)
			}
		case StepTry:
			if !f.Idle || f.Target != TargetNew || f.Boot != BootSettled || f.Policy != PolicyInstall || f.Hold == HoldAll {
				t.Errorf("tries with %+v", f)
			}
		case StepConfirm:
			if f.Boot != BootTrial || f.Health != HealthGood {
				t.Errorf("confirms with %+v", f)
			}
		case StepFetch:
			if f.SpaceShort || f.Policy == PolicyOff || f.Target != TargetNew {
				t.Errorf("fetches with %+v", f)
			}
		case StepFallback:
			if f.Boot != BootTrial || f.Health != HealthBad {
				t.Errorf("falls back with %+v", f)
			}
		case StepRestart:
			if f.Boot == BootArmed && f.Hold != HoldNone {
				t.Errorf("restarts while it is held: %+v", f)
			}
			if f.Unrecorded {
				t.Errorf("restarts before the failure is recorded: %+v", f)
			}
		}
	})
	t.Logf("%d combinations of facts", n)
}

// world is the smallest model of a device that next can act on.
type world struct {
	Facts
	healthy bool // what a health check would find
	tried   int
}

// do applies what a step does when it succeeds. A step that needs the
// environment (bytes, space) succeeds at once: the question is whether next gets
// stuck by itself.
func (w world) do(step Step) world {
	switch step {
	case StepFetch:
		w.Image = ImageWhole
	case StepWrite:
		w.Idle = true
	case StepTry:
		w.Boot, w.tried = BootArmed, w.tried+1
	case StepRestart:
		if w.Boot == BootArmed {
			w.Boot, w.Health, w.Idle = BootTrial, HealthUnknown, false
		} else {
			w.Boot = BootSettled
		}
	case StepCheck:
		w.Health = HealthBad
		if w.healthy {
			w.Health = HealthGood
		}
	case StepConfirm:
		w.Boot, w.Target, w.Health = BootSettled, TargetRunning, HealthUnknown
	case StepFallback:
		w.Boot, w.Unrecorded, w.Health = BootReturned, true, HealthUnknown
	case StepRecord:
		w.Unrecorded, w.Target = false, TargetFailed
	}
	return w
}

func TestNoStateSticks(t *testing.T) {
	everyFact(func(f Facts) {
		for _, healthy := range []bool{true, false} {
			w := world{Facts: f, healthy: healthy}
			trail := ""
			for n := 0; ; n++ {
				step := next(w.Facts)
				if step == StepWait {
					break
				}
				trail += " " + step.String()
				if n > 12 {
					t.Fatalf("%+v healthy=%v never comes to rest:%s", f, healthy, trail)
				}
				w = w.do(step)
			}
			if w.tried > 1 {
				t.Errorf("%+v healthy=%v tries the same image %d times:%s", f, healthy, w.tried, trail)
			}
			free := f.Policy == PolicyInstall && f.Target == TargetNew && f.Hold == HoldNone && (!f.SpaceShort || f.Image == ImageWhole || f.Idle)
			if !free || f.Boot != BootSettled || f.Unrecorded {
				continue
			}
			want := StateRolledBack
			if healthy {
				want = StateConfirmed
			}
			if got := state(w.Facts, true); got != want {
				t.Errorf("%+v healthy=%v ends %s, want %s:%s", f, healthy, got, want, trail)
			}
		}
	})
}

// A power cut after any step loses only what is in memory, the outcome of the
// health check; the device must still come to rest, and not try the image again.
func TestCutAfterAnyStepComesToRest(t *testing.T) {
	everyFact(func(f Facts) {
		for cut := range 10 {
			for _, healthy := range []bool{true, false} {
				w := world{Facts: f, healthy: healthy}
				for n := 0; ; n++ {
					if n == cut {
						w.Health = HealthUnknown
					}
					step := next(w.Facts)
					if step == StepWait {
						break
					}
					if n > 14 {
						t.Fatalf("%+v cut after %d never comes to rest", f, cut)
					}
					w = w.do(step)
				}
				if w.tried > 1 {
					t.Errorf("%+v cut after %d tries %d times", f, cut, w.tried)
				}
			}
		}
	})
}

func TestEveryFactHasAWord(t *testing.T) {
	seen := map[DeviceState]bool{}
	everyFact(func(f Facts) {
		for _, have := range []bool{false, true} {
			s := state(f, have)
			seen[s] = true
			if s == StateConfirmed && (f.Boot != BootSettled || f.Target != TargetRunning) {
				t.Errorf("called confirmed with %+v", f)
			}
		}
	})
	for _, s := range []DeviceState{StateWaiting, StateFetching, StateFetched, StateInstalled, StateTrial, StateConfirmed, StateRolledBack, StateBlocked} {
		if !seen[s] {
			t.Errorf("no facts are called %s", s)
		}
	}
	if seen[StateSilent] {
		t.Error("a device cannot call itself silent")
	}
}
