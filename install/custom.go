package install

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"strconv"
	"time"

	"meshupd/verify"
)

// Custom is a bootloader that an executable of the integrator drives. It is run with one of these verbs, exits with 0 when the
// change is durable, and says on the last line of standard error why when it does not.
//
//	get-state      prints {"default":"a"}, and with a trial {"default":"a","trial":"b","left":2}: the starts that the
//	               bootloader will still give it, 0 when it is used up. "booted":"b" may say which slot runs.
//	try SLOT N     the next N starts boot SLOT, then the default again
//	confirm SLOT   SLOT is the default; there is no trial, and the other slot is not booted
//	fallback SLOT  the same words for giving up: there is no trial any more, SLOT is (and was) the default
//
// SLOT is a or b. After a fault in the middle of a verb the old state or the new one must stand.
type Custom struct {
	// Command and its first arguments; the verb comes behind.
	Command []string
	// Timeout of one run; 30 s when zero.
	Timeout time.Duration
	// Most starts of a trial that the bootloader counts by itself; 1 when zero.
	Most int
}

func (c Custom) open(env loaderEnv) (medium, error) {
	if c.Most == 0 {
		c.Most = 1
	}
	switch {
	case len(c.Command) == 0 || c.Command[0] == "":
		return nil, verify.Refuse(verify.CodeConfig, "the command of the custom bootloader is empty")
	case c.Most < 1 || c.Most > maxStarts:
		return nil, verify.Refuse(verify.CodeConfig, "a custom bootloader that counts %d starts: not 1 to %d", c.Most, maxStarts)
	}
	c.Timeout = orElse(c.Timeout, 30*time.Second)
	return &custom{c, env.step}, nil
}

type custom struct {
	Custom
	step func(name string, do func() error) error
}

// maxCustomState bounds what get-state may print.
const maxCustomState = 4 << 10

// parseCustomState reads what get-state printed. Fields that are not known are passed over. Errors are E-BOOT.
func parseCustomState(data []byte) (choice, error) {
	var said struct {
		Default SlotName `json:"default"`
		Trial   SlotName `json:"trial"`
		Left    int      `json:"left"`
		Booted  SlotName `json:"booted"`
	}
	if len(data) > maxCustomState {
		return choice{}, verify.Refuse(verify.CodeBoot, "read the custom boot state: larger than %d bytes", maxCustomState)
	}
	if err := json.Unmarshal(data, &said); err != nil {
		return choice{}, verify.Refuse(verify.CodeBoot, "read the custom boot state: %w", err)
	}
	c := choice{Default: said.Default, Trial: said.Trial, Left: said.Left, Booted: said.Booted}
	if what := c.wrong(); what != "" {
		return choice{}, verify.Refuse(verify.CodeBoot, "read the custom boot state: %s", what)
	}
	return c, nil
}

func (c *custom) most() int { return c.Most }

func (c *custom) run(ctx context.Context, out *capped, verb ...string) error {
	cmd := command{argv: append(append([]string(nil), c.Command...), verb...), timeout: c.Timeout}
	if out != nil {
		cmd.stdout = out
	}
	err := cmd.run(ctx)
	if err != nil && ctx.Err() != nil {
		return ctx.Err()
	}
	return coded(verify.CodeBoot, "run the custom bootloader, "+verb[0], err)
}

func (c *custom) read(ctx context.Context) (choice, error) {
	out := &capped{limit: maxCustomState}
	if err := c.run(ctx, out, "get-state"); err != nil {
		return choice{}, err
	}
	return parseCustomState(out.data.Bytes())
}

func (c *custom) write(ctx context.Context, want choice) error {
	now, err := c.read(ctx)
	if err != nil {
		return err
	}
	if now.same(want) {
		return nil
	}
	verb := []string{"fallback", string(want.Default)}
	switch {
	case want.Trial != "" && want.Left > 0:
		verb = []string{"try", string(want.Trial), strconv.Itoa(want.Left)}
	case want.Default != now.Default:
		verb[0] = "confirm"
	}
	if err := c.step("boot.write", func() error { return c.run(ctx, nil, verb...) }); err != nil {
		return coded(verify.CodeBoot, "change the custom boot state", err)
	}
	if now, err = c.read(ctx); err != nil {
		return err
	}
	if !now.same(want) {
		return verify.Refuse(verify.CodeBoot, "the custom bootloader says after %s: default %s, trial %q, %d starts left", verb[0], now.Default, string(now.Trial), now.Left)
	}
	return nil
}

// capped keeps what is written to it up to one byte above the limit, and then fails.
type capped struct {
	limit int
	data  bytes.Buffer
}

func (c *capped) Write(p []byte) (int, error) {
	room := c.limit + 1 - c.data.Len()
	if len(p) > room {
		c.data.Write(p[:room])
		return room, errors.New("too much output")
	}
	return c.data.Write(p)
}
