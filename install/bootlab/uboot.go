package bootlab

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"

	"meshupd/install"
)

// Board is an arm64 board in qemu with a real U-Boot, which runs packaging/boot/uboot.cmd as it is shipped: from a boot
// partition, as a script made by mkimage. The slots hold a "kernel" of fifty instructions that U-Boot loads and starts as it
// would Linux; it says on the serial line what it was told, and resets the board.
//
// What this is not: Debian's U-Boot keeps its environment in a flash that qemu does not let it write, and has no boot
// counting. uboot.env does both in U-Boot's commands, from a disk.
type Board struct {
	dir    string
	blank  string // a disk with script and partition table
	flash  string // what U-Boot knows by itself
	starts int
	image  []byte                 // of both slots, where only the choice matters
	known  map[[32]byte]boardTurn // what a start makes of an environment
}

// Places on the board's disk. EnvSize is one copy of the environment, EnvApart from the start of one to that of the next.
const (
	EnvSize  = 16 << 10
	EnvApart = 128 << 10
	// BoardSlotSize is the size of a slot.
	BoardSlotSize = 1 * mib

	boardBoot = 1 * mib
	boardEnv  = 3 * mib
	boardA    = 4 * mib
	boardB    = boardA + BoardSlotSize
	boardSize = boardB + BoardSlotSize + 1*mib

	// BoardBIOS is Debian's U-Boot, package u-boot-qemu.
	BoardBIOS  = "/usr/lib/u-boot/qemu_arm64/u-boot.bin"
	boardLimit = 5 * time.Minute
)

//go:embed uboot.env
var boardFlash []byte

// NewBoard makes a board's disk and flash in dir. root is the folder of the repository.
func NewBoard(ctx context.Context, dir, root string) (*Board, error) {
	b := &Board{dir: dir, blank: filepath.Join(dir, "board.img"), flash: filepath.Join(dir, "flash.img"), known: make(map[[32]byte]boardTurn)}
	var err error
	if b.image, err = BoardImage(ctx, dir, FactoryVersion); err != nil {
		return nil, err
	}
	text, script := filepath.Join(dir, "uboot.env"), filepath.Join(dir, "boot.scr")
	if err := os.WriteFile(text, boardFlash, 0o600); err != nil {
		return nil, err
	}
	if _, err := tool(ctx, "", nil, "mkenvimage", "-s", "0x40000", "-o", b.flash, text); err != nil {
		return nil, err
	}
	if err := os.Truncate(b.flash, 64*mib); err != nil { // the size of the chip
		return nil, err
	}
	if _, err := tool(ctx, "", nil, "mkimage", "-A", "arm64", "-T", "script", "-C", "none",
		"-d", filepath.Join(root, "packaging", "boot", "uboot.cmd"), script); err != nil {
		return nil, err
	}
	compiled, err := os.ReadFile(script)
	if err != nil {
		return nil, err
	}
	boot, err := fileSystem(ctx, "vfat", dir, map[string][]byte{"boot.scr": compiled}, boardEnv-boardBoot)
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(b.blank, nil, 0o600); err != nil {
		return nil, err
	}
	if err := os.Truncate(b.blank, boardSize); err != nil {
		return nil, err
	}
	var table strings.Builder
	table.WriteString("label: gpt\n")
	for _, p := range []struct {
		name string
		at   int
		end  int
	}{{"boot", boardBoot, boardEnv}, {"env", boardEnv, boardA}, {"rootfs-a", boardA, boardB}, {"rootfs-b", boardB, boardB + BoardSlotSize}} {
		fmt.Fprintf(&table, "start=%d, size=%d, name=%s\n", p.at/512, (p.end-p.at)/512, p.name)
	}
	if _, err := tool(ctx, "", strings.NewReader(table.String()), "sfdisk", "--quiet", b.blank); err != nil {
		return nil, err
	}
	return b, patch(b.blank, map[int64][]byte{boardBoot: boot})
}

// patch writes into an existing file.
func patch(path string, parts map[int64][]byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	for at, data := range parts {
		if _, err := f.WriteAt(data, at); err != nil {
			return err
		}
	}
	return f.Close()
}

// BoardImage makes what a slot of a board holds.
func BoardImage(ctx context.Context, dir, version string) ([]byte, error) {
	return fileSystem(ctx, "ext4", dir, map[string][]byte{"boot/Image": boardKernel(version)}, BoardSlotSize)
}

// BoardFault is what is wrong with the board's disk.
type BoardFault string

// The faults.
const (
	BoardReadOnly BoardFault = "nothing can be written"
	BoardNoEnv    BoardFault = "the environment cannot be read"
)

// BoardDisk is what changes on a board's disk from start to start.
type BoardDisk struct {
	Env  []byte // from the start of the first copy, at least to the end of the second
	A, B []byte
	// Log, if not "", is an empty file, where all writes to the disk are recorded.
	Log string
}

// BoardStart is what one start of the board did.
type BoardStart struct {
	Slot    install.SlotName // which slot the kernel was told that it is, and
	Version string           // which kernel that was
	Said    string           // the serial line
}

// ErrNoStart is the end of a start at which no slot was booted.
var ErrNoStart = errors.New("U-Boot started no slot")

// Start switches the board on, waits until a slot has run and reset the board, and notes in d what U-Boot wrote.
func (b *Board) Start(ctx context.Context, d *BoardDisk, fault BoardFault) (BoardStart, error) {
	said, err := b.run(ctx, d, fault, func(out io.Reader, _ func()) (string, error) {
		text, err := io.ReadAll(out)
		return string(text), err
	})
	if err != nil {
		return BoardStart{Said: said}, err
	}
	return parseBoardStart(said)
}

// Cut switches the board on and cuts its power a time after the serial line said a word. It tells what was said by then.
func (b *Board) Cut(ctx context.Context, d *BoardDisk, word string, after time.Duration) (string, error) {
	return b.run(ctx, d, "", func(out io.Reader, cut func()) (string, error) {
		var said strings.Builder
		buf := make([]byte, 4096)
		for !strings.Contains(said.String(), word) {
			n, err := out.Read(buf)
			said.Write(buf[:n])
			if err != nil {
				return said.String(), fmt.Errorf("the board never said %q: %w", word, err)
			}
		}
		// Not a wait for a state: the moment of the cut is what is random here.
		time.Sleep(after)
		cut()
		rest, err := io.ReadAll(out)
		return said.String() + string(rest), err
	})
}

// run has qemu run while listen reads the serial line, which listen may cut short.
func (b *Board) run(ctx context.Context, d *BoardDisk, fault BoardFault, listen func(out io.Reader, cut func()) (string, error)) (string, error) {
	b.starts++
	path := filepath.Join(b.dir, "start-"+strconv.Itoa(b.starts)+".img")
	defer os.Remove(path)
	if err := b.disk(ctx, d, path); err != nil {
		return "", err
	}
	args, err := b.args(path, d.Log, fault)
	if err != nil {
		return "", err
	}
	ctx, stop := context.WithTimeout(ctx, boardLimit)
	defer stop()
	cmd := exec.CommandContext(ctx, "nice", append([]string{"-n", "19", "qemu-system-aarch64"}, args...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return "", err
	}
	cmd.Stderr = cmd.Stdout
	if err := cmd.Start(); err != nil {
		return "", fmt.Errorf("start qemu: %w", err)
	}
	isCut := false
	said, err := listen(out, func() { isCut = cmd.Process.Kill() == nil })
	if werr := cmd.Wait(); werr != nil && !isCut {
		return said, fmt.Errorf("run the board: %w: %.300s", werr, said)
	}
	if err != nil {
		return said, err
	}
	f, err := os.Open(path)
	if err != nil {
		return said, err
	}
	defer f.Close()
	_, err = f.ReadAt(d.Env, boardEnv)
	return said, err
}

func (b *Board) disk(ctx context.Context, d *BoardDisk, path string) error {
	if len(d.Env) < EnvApart+EnvSize || len(d.Env) > boardA-boardEnv || len(d.A) != BoardSlotSize || len(d.B) != BoardSlotSize {
		return fmt.Errorf("a board's disk of %d, %d and %d bytes", len(d.Env), len(d.A), len(d.B))
	}
	if _, err := tool(ctx, "", nil, "cp", "--sparse=always", b.blank, path); err != nil {
		return err
	}
	return patch(path, map[int64][]byte{boardEnv: d.Env, boardA: d.A, boardB: d.B})
}

func (b *Board) args(path, log string, fault BoardFault) ([]string, error) {
	args := []string{"-M", "virt", "-cpu", "cortex-a53", "-m", "128", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-serial", "stdio", "-bios", BoardBIOS, "-drive", "if=pflash,unit=1,format=raw,readonly=on,file=" + b.flash,
		"-device", "virtio-blk-device,drive=d0"}
	file := "driver=file,node-name=f0,filename=" + path
	switch fault {
	case BoardReadOnly:
		return append(args, "-blockdev", file+",read-only=on", "-blockdev", "driver=raw,node-name=d0,file=f0,read-only=on"), nil
	case BoardNoEnv:
		var rules strings.Builder
		for _, at := range []int{boardEnv, boardEnv + EnvApart} {
			fmt.Fprintf(&rules, "[inject-error]\nevent = \"none\"\niotype = \"read\"\nerrno = \"5\"\nsector = \"%d\"\nonce = \"off\"\n", at/512)
		}
		config := path + ".faults"
		if err := os.WriteFile(config, []byte(rules.String()), 0o600); err != nil {
			return nil, err
		}
		return append(args, "-blockdev", file, "-blockdev", "driver=blkdebug,node-name=d0,image=f0,config="+config), nil
	}
	if log != "" {
		return append(args, "-blockdev", file, "-blockdev", "driver=file,filename="+log+",node-name=l0",
			"-blockdev", "driver=blklogwrites,node-name=d0,file=f0,log=l0,log-super-update-interval=1"), nil
	}
	return append(args, "-blockdev", file, "-blockdev", "driver=raw,node-name=d0,file=f0"), nil
}

// ReadBoardLog reads what U-Boot wrote as if it had been to the boot partition of a Disk, where the environment is for the back end.
func ReadBoardLog(path string) ([]Entry, error) {
	if info, err := os.Stat(path); err != nil || info.Size() == 0 {
		return nil, err // nothing was written
	}
	log, err := ReadLog(path, boardSize)
	for i, e := range log {
		if len(e.Data) > 0 && (e.At < boardEnv || e.At+int64(len(e.Data)) > boardA) {
			return nil, fmt.Errorf("U-Boot writes to %d, where no environment is", e.At)
		}
		log[i].At += layout[PartBoot].at - boardEnv
	}
	return log, err
}

var boardTold = regexp.MustCompile(MarkerPrefix + `BOOT version=(\S+) .*\bmeshupd\.slot=([ab])\b`)

func parseBoardStart(said string) (BoardStart, error) {
	told := boardTold.FindStringSubmatch(said)
	if told == nil {
		return BoardStart{Said: said}, fmt.Errorf("%w:\n%s", ErrNoStart, said)
	}
	return BoardStart{Slot: install.SlotName(told[2]), Version: told[1], Said: said}, nil
}
