package bootlab

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"meshupd/install"
)

// ubootKind has the environment in two copies on a partition of its own, where Board finds it too.
var ubootKind = Kind{
	Name: "uboot",
	FS:   "raw",
	Loader: func(boot, run string) (install.Loader, error) {
		config := filepath.Join(run, "fw_env.config")
		text := fmt.Sprintf("%s 0 %#x\n%s %#x %#x\n", boot, EnvSize, boot, EnvApart, EnvSize)
		return install.UBoot{Config: config}, os.WriteFile(config, []byte(text), 0o644)
	},
	Tree: func() (map[string][]byte, error) {
		env := make([]byte, EnvApart+EnvSize)
		copy(env[5:], "BOOT_ORDER=A\x00BOOT_A_LEFT=3\x00BOOT_B_LEFT=0\x00")
		env[4] = 254 // the counter is to go round
		binary.LittleEndian.PutUint32(env, crc32.ChecksumIEEE(env[5:EnvSize]))
		return map[string][]byte{"": env}, nil
	},
	Turn: func(boot []byte, _ string) (Turn, error) {
		vars, err := newestEnv(boot)
		if err != nil {
			return Turn{}, err
		}
		return turnOfUBootEnv(vars), nil
	},
}

// newestEnv reads the environment of two copies as U-Boot does (env_import_redund).
func newestEnv(boot []byte) (map[string]string, error) {
	var best []byte
	for _, at := range []int{0, EnvApart} {
		c := boot[at : at+EnvSize]
		// The counter of a byte goes round.
		if crc32.ChecksumIEEE(c[5:]) == binary.LittleEndian.Uint32(c) && (best == nil || int8(c[4]-best[4]) > 0) {
			best = c
		}
	}
	if best == nil {
		return nil, fmt.Errorf("no copy of the environment is valid")
	}
	vars := make(map[string]string)
	for text := range bytes.SplitSeq(best[5:], []byte{0}) {
		if name, value, found := strings.Cut(string(text), "="); found {
			vars[name] = value
		}
	}
	return vars, nil
}

// turnOfUBootEnv is packaging/boot/uboot.cmd in Go, for BOOT_ORDER. The slot of the last start is the default's.
func turnOfUBootEnv(vars map[string]string) Turn {
	order := strings.Fields(vars["BOOT_ORDER"])
	last := order[len(order)-1]
	pick := last
	for _, slot := range order[:len(order)-1] {
		if left, err := strconv.ParseUint(vars["BOOT_"+slot+"_LEFT"], 16, 31); err == nil && left > 0 {
			pick = slot
			break
		}
	}
	return Turn{install.SlotName(strings.ToLower(pick)), install.SlotName(strings.ToLower(last))}
}

// Turn is Kind.Turn by real starts of U-Boot, one after the other until one changes nothing any more. What it says must be what
// the Go reading of the script says. A start from the same environment is made once.
func (b *Board) Turn(boot []byte, scratch string) (Turn, error) {
	env := boot[:EnvApart+EnvSize]
	var turn Turn
	for range maxBoardStarts {
		before := sha256.Sum256(env)
		after, known := b.known[before]
		if !known {
			d := BoardDisk{Env: bytes.Clone(env), A: b.image, B: b.image}
			start, err := b.Start(context.Background(), &d, "")
			if err != nil {
				return Turn{}, err
			}
			after = boardTurn{start.Slot, d.Env}
			b.known[before] = after
		}
		if turn.Next == "" {
			turn.Next = after.slot
		}
		turn.Default = after.slot
		if bytes.Equal(after.env, env) {
			read, err := ubootKind.Turn(boot, scratch)
			if err == nil && read != turn {
				err = fmt.Errorf("U-Boot starts %+v, and by its script it would be %+v", turn, read)
			}
			return turn, err
		}
		env = after.env
	}
	return Turn{}, fmt.Errorf("U-Boot still changes its environment after %d starts", maxBoardStarts)
}

const maxBoardStarts = 10

// boardTurn is what a start came to.
type boardTurn struct {
	slot install.SlotName
	env  []byte
}

// Kind is that of the board: the real U-Boot says what would be started.
func (b *Board) Kind() Kind {
	k := ubootKind
	k.Turn = b.Turn
	return k
}

// Starts is how often the board was switched on.
func (b *Board) Starts() int { return b.starts }
