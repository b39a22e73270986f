package install

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"net"
	"os"
	"path/filepath"
	"time"
)

// SWUpdate is the Program swupdate. arguments stand before "-i FILE", such as {"-k", "cert.pem", "-e", "stable,{slot}"}.
func SWUpdate(arguments ...string) Program {
	return Program{Command: append(append([]string{"swupdate"}, arguments...), "-i", "{file}"), Blame: "[ERROR]", Progress: "swupdateprog"}
}

// The messages of swupdate's progress socket: struct progress_msg of its progress_ipc.h, in the machine's own byte order, as 64-bit
// machines and ARM lay it out. Since version 2023.05 a greeting of 8 bytes comes first: its version, and "ACK".
const (
	swuMessage  = 2416
	swuGreeting = 8
)

// parseSWUpdateProgress returns the percent of the whole installation that a message tells of. Any local user may have
// made it: it is only ever shown.
func parseSWUpdateProgress(msg []byte) (percent int, ok bool) {
	if len(msg) < 36 {
		return 0, false
	}
	field := func(at int) uint64 { return uint64(binary.NativeEndian.Uint32(msg[at:])) }
	steps, step, done := field(24), field(28), field(32)
	if steps == 0 || step == 0 || step > steps || done > 100 {
		return 0, false
	}
	return int(((step-1)*100 + done) / steps), true
}

// watchSWUpdate tells what the program says on its progress socket, until ctx ends.
func watchSWUpdate(ctx context.Context, socket string, tell func(percent int)) {
	path := filepath.Join(os.TempDir(), socket) // by the rule of swupdate
	for ctx.Err() == nil {
		conn, err := (&net.Dialer{}).DialContext(ctx, "unix", path)
		if err != nil { // it makes the socket a little after its start
			_ = pause(ctx, 20*time.Millisecond)
			continue
		}
		stop := context.AfterFunc(ctx, func() { conn.Close() })
		readSWUpdate(conn, tell)
		stop()
		conn.Close()
		_ = pause(ctx, 100*time.Millisecond) // the socket of another one, maybe
	}
}

// readSWUpdate reads messages until there are no more.
func readSWUpdate(r io.Reader, tell func(percent int)) {
	msg := make([]byte, swuMessage)
	rest := msg
	for first := true; ; first = false {
		if first {
			if _, err := io.ReadFull(r, msg[:swuGreeting]); err != nil {
				return
			}
			if rest = msg[swuGreeting:]; bytes.Equal(msg[4:swuGreeting], []byte("ACK\x00")) {
				rest = msg
			}
		}
		if _, err := io.ReadFull(r, rest); err != nil {
			return
		}
		rest = msg
		if percent, ok := parseSWUpdateProgress(msg); ok {
			tell(percent)
		}
	}
}
