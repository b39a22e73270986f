package bootlab

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"meshupd/install"
)

// Limit is how long one start of qemu may take: with a busy processor it is ten times slower than with an idle one.
const Limit = 30 * time.Minute

// Machine is a computer in qemu.
type Machine struct {
	Kind     Kind
	Kernel   Kernel
	Disk     Disk
	Stick    string // a .update file, or "": the second disk
	Data     string // a file system with the daemon's program, for its state: the third disk, or ""
	Scenario Scenario
	// Slot, if not "", is started by the lab itself, which is quicker; the firmware and the bootloader are then not run, and a restart
	// ends the machine.
	Slot install.SlotName
	// UserMode, if it has an image, is what starts the slot instead of qemu: quicker by far.
	UserMode UserKernel
	// Log, if not "", is where all writes to the disk are recorded.
	Log string
	// Faulty, if not "", is a configuration of qemu's blkdebug between the disk and its file.
	Faulty string
}

// Run is a machine that is switched on.
type Run struct {
	cmd   *exec.Cmd
	ctx   context.Context
	stop  context.CancelFunc
	lines chan string
	dir   string    // of a user-mode kernel
	rec   *recorder // of one whose writes are recorded

	mu   sync.Mutex // owns:
	said []string   // all lines of the serial line
}

// Line is one marker with its text.
type Line struct {
	Marker Marker
	Text   string
}

// kernelWords end the kernel's command line. The check of the timer panics on a machine that gets too little of the real one's time.
func kernelWords(kind string) string {
	return "panic=1 no_timer_check console=ttyS0 mitigations=off random.trust_cpu=on lab.loader=" + kind
}

// kernelLine is the whole command line of a slot.
func kernelLine(slot install.SlotName, kind string) string {
	return fmt.Sprintf("root=/dev/nvme0n1p%d rootwait ro quiet meshupd.slot=%s %s", Part(slot), slot, kernelWords(kind))
}

// Start switches the machine on. Whoever starts it ends it by Wait, Cut or Close.
func (m Machine) Start(ctx context.Context) (*Run, error) {
	ctx, stop := context.WithTimeout(ctx, Limit)
	r := &Run{ctx: ctx, stop: stop, lines: make(chan string, 1000)}
	args, err := r.plan(m)
	if err != nil {
		return nil, errors.Join(err, r.tidy())
	}
	// nice: a machine for tests should not slow down the one it runs on. It becomes qemu, so that a signal reaches that.
	r.cmd = exec.CommandContext(ctx, "nice", append([]string{"-n", "19"}, args...)...)
	r.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	out, err := r.cmd.StdoutPipe()
	if err != nil {
		return nil, errors.Join(err, r.tidy())
	}
	r.cmd.Stderr = r.cmd.Stdout
	if err := r.cmd.Start(); err != nil {
		return nil, errors.Join(fmt.Errorf("start the machine: %w", err), r.tidy())
	}
	go r.listen(out)
	return r, nil
}

// plan is the command line of the machine, and what has to be there before it.
func (r *Run) plan(m Machine) ([]string, error) {
	if m.UserMode.Image == "" {
		return append([]string{"qemu-system-x86_64"}, m.args()...), nil
	}
	var err error
	if r.dir, err = os.MkdirTemp(filepath.Dir(m.Disk.Path), "usermode-"); err != nil {
		return nil, err
	}
	disk := m.Disk.Path
	if m.Log != "" {
		if r.rec, err = newRecorder(r.ctx, m, r.dir); err != nil {
			return nil, err
		}
		disk = r.rec.file
	}
	return m.UserMode.args(m, disk, r.dir)
}

// tidy ends what was there for the machine.
func (r *Run) tidy() (err error) {
	if r.rec != nil {
		err = r.rec.close()
	}
	r.stop()
	if r.dir != "" {
		err = errors.Join(err, os.RemoveAll(r.dir))
	}
	return err
}

func (m Machine) args() []string {
	args := []string{"-M", "q35,accel=tcg", "-cpu", "max", "-m", "256", "-nodefaults", "-no-user-config", "-display", "none",
		"-serial", "stdio", "-smbios", "type=1,serial=" + m.Scenario.String()}
	file := "driver=file,filename=" + m.Disk.Path
	if m.Data != "" {
		// Behind the others, which the kernel counts from the lowest address on.
		args = append(args, "-m", "512", "-blockdev", "driver=file,node-name=e0,filename="+m.Data, "-blockdev", "driver=raw,node-name=e1,file=e0",
			"-device", "nvme,addr=0x1e,drive=e1,serial="+SerialData)
	}
	switch {
	case m.Log != "":
		args = append(args, "-blockdev", file+",node-name=f0", "-blockdev", "driver=file,filename="+m.Log+",node-name=l0",
			"-blockdev", "driver=blklogwrites,node-name=d0,file=f0,log=l0")
	case m.Faulty != "":
		args = append(args, "-blockdev", file+",node-name=f0", "-blockdev", "driver=blkdebug,node-name=d0,image=f0,config="+m.Faulty)
	default:
		args = append(args, "-blockdev", file+",node-name=f0", "-blockdev", "driver=raw,node-name=d0,file=f0")
	}
	if m.Kind.EFI && m.Slot == "" {
		// Without a boot index: with one this firmware would set BootOrder by itself.
		args = append(args, "-device", "nvme,drive=d0,serial=d0", "-drive", "if=pflash,unit=0,format=raw,readonly=on,file="+ovmfCode,
			"-drive", "if=pflash,unit=1,format=raw,file="+m.Disk.Vars)
	} else {
		args = append(args, "-device", "nvme,drive=d0,serial=d0,bootindex=1")
	}
	if m.Stick != "" {
		args = append(args, "-blockdev", "driver=file,read-only=on,node-name=s0,filename="+m.Stick, "-blockdev", "driver=raw,read-only=on,node-name=s1,file=s0",
			"-device", "nvme,drive=s1,serial=s1")
	}
	if m.Slot != "" {
		args = append(args, "-no-reboot", "-kernel", m.Kernel.Image, "-append", kernelLine(m.Slot, m.Kind.Name))
	}
	return args
}

// listen takes the serial line apart until qemu ends.
func (r *Run) listen(out io.Reader) {
	defer close(r.lines)
	in := bufio.NewReaderSize(out, 64<<10)
	for {
		line, err := in.ReadString('\n')
		if line = strings.TrimRight(line, "\r\n"); line != "" {
			r.mu.Lock()
			r.said = append(r.said, line)
			r.mu.Unlock()
			r.lines <- line
		}
		if err != nil {
			return
		}
	}
}

// Next waits for the next marker. It returns io.EOF when the machine is off.
func (r *Run) Next() (Line, error) {
	for line := range r.lines {
		if i := strings.Index(line, MarkerPrefix); i >= 0 {
			marker, text, _ := strings.Cut(line[i+len(MarkerPrefix):], " ")
			return Line{Marker(marker), text}, nil
		}
	}
	if err := r.ctx.Err(); err != nil {
		return Line{}, fmt.Errorf("the machine did not come to an end: %w", err)
	}
	return Line{}, io.EOF
}

// Until waits for a marker and returns it with all that came before. Without it, when the machine ends, the error is io.EOF.
func (r *Run) Until(want Marker) (seen []Line, err error) {
	for {
		line, err := r.Next()
		if err != nil {
			return seen, err
		}
		seen = append(seen, line)
		if line.Marker == want {
			return seen, nil
		}
	}
}

// Rest waits for the end of the machine and returns the markers on the way.
func (r *Run) Rest() ([]Line, error) {
	seen, err := r.Until("no such marker")
	if !errors.Is(err, io.EOF) {
		return seen, err
	}
	return seen, nil
}

// Cut cuts the power: nothing that the machine still wanted to do is done. It returns the markers that came and were not taken.
func (r *Run) Cut() ([]Line, error) {
	if r.cmd.ProcessState != nil {
		return nil, nil // it has ended, and its number may be another's
	}
	// The group: a user-mode kernel is several processes.
	if err := syscall.Kill(-r.cmd.Process.Pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
		return nil, err
	}
	rest, err := r.Rest()
	return rest, errors.Join(err, r.end())
}

// Close switches the machine off if it is still on.
func (r *Run) Close() error {
	_, err := r.Cut()
	return err
}

// end waits for the process. That it was killed is no error.
func (r *Run) end() error {
	var exit *exec.ExitError
	err := r.cmd.Wait()
	if err != nil && strings.Contains(err.Error(), "already called") {
		return nil
	}
	if errors.As(err, &exit) {
		err = nil
	}
	return errors.Join(err, r.tidy())
}

// Said is the whole serial line so far.
func (r *Run) Said() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return strings.Join(r.said, "\n")
}
