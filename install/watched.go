package install

import (
	"context"
	"time"
)

// lookEvery is the time between two looks at what runs on trial.
const lookEvery = time.Second

// checkWatched runs check, and look again and again meanwhile, for settle at least: a release that passes its check and
// ends a moment later is not healthy. The first error of either ends it at once; otherwise it ends with a look that is
// sure. look says whether it could see what it looks at.
func checkWatched(ctx context.Context, settle time.Duration, check func(context.Context) error, look func(context.Context) (sure bool, err error)) error {
	inner, cancel := context.WithCancel(ctx)
	answer := make(chan error, 1)
	go func() { answer <- check(inner) }()
	ended := false
	defer func() {
		cancel()
		if !ended {
			<-answer
		}
	}()
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	settled := time.NewTimer(settle)
	defer settled.Stop()
	for checked, stays := false, false; ; {
		sure, err := look(ctx)
		if err != nil {
			return err
		}
		if checked && stays && sure {
			return nil
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case err := <-answer:
			if ended = true; err != nil {
				return err
			}
			checked, answer = true, nil
		case <-settled.C:
			stays = true
		case <-tick.C:
		}
	}
}
