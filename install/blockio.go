package install

import (
	"bytes"
	"errors"
	"io"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	blockChunk = 1 << 20 // read, compared and written at once
	// syncEvery is how much is written before the kernel is told to begin with it: the medium then works all the time, and
	// not only in the sync at the end.
	syncEvery = 8 << 20
	// maxPause is the largest number of chunks that are written without a look at what is there.
	maxPause = 32
)

// blockWriter writes a stream to a device from its start, and leaves alone the blocks that are already right: flash
// wears by writing. Where nothing matches, looking costs as much as writing; it then looks at ever fewer chunks.
// The medium works in a goroutine, while the next chunk is decoded and hashed. Every writer must be ended by stop.
type blockWriter struct {
	f    *os.File
	size int64 // of the device

	buf    []byte        // being filled
	full   chan []byte   // to the goroutine
	free   chan []byte   // and back
	failed chan error    // its first error
	done   chan struct{} // it has ended
	closed bool          // full is

	// Owned by the goroutine until done.
	at     int64 // where the next chunk goes
	old    []byte
	misses int // chunks in a row that were looked at and had nothing in common
	pause  int // chunks to write before the next look
	queued int64

	written, same int64 // bytes
}

func newBlockWriter(f *os.File, size int64) *blockWriter {
	w := &blockWriter{
		f: f, size: size, buf: make([]byte, 0, blockChunk), old: make([]byte, blockChunk),
		full: make(chan []byte, 1), free: make(chan []byte, 3), failed: make(chan error, 1), done: make(chan struct{}),
	}
	w.free <- make([]byte, 0, blockChunk)
	w.free <- make([]byte, 0, blockChunk)
	go w.work()
	return w
}

// work writes chunks until full is closed. After an error it only takes them.
func (w *blockWriter) work() {
	defer close(w.done)
	bad := false
	for chunk := range w.full {
		if !bad {
			if err := w.flush(chunk); err != nil {
				bad = true
				w.failed <- err
			}
		}
		w.free <- chunk[:0]
	}
}

// Write may return the error of an earlier one.
func (w *blockWriter) Write(p []byte) (int, error) {
	done := 0
	for done < len(p) {
		n := min(len(p)-done, blockChunk-len(w.buf))
		w.buf = append(w.buf, p[done:done+n]...)
		done += n
		if len(w.buf) == blockChunk {
			w.full <- w.buf
			w.buf = <-w.free
			select {
			case err := <-w.failed:
				return done, err
			default:
			}
		}
	}
	return done, nil
}

// finish writes what is left, with zeros up to the end of its block: the rest of a block of an older image is no one's.
func (w *blockWriter) finish() error {
	if tail := int64(len(w.buf)) % blockSize; tail > 0 {
		w.buf = append(w.buf, make([]byte, blockSize-tail)...)
	}
	w.full <- w.buf
	w.stop()
	select {
	case err := <-w.failed:
		return err
	default:
		return nil
	}
}

// stop waits for the goroutine.
func (w *blockWriter) stop() {
	if !w.closed {
		w.closed = true
		close(w.full)
	}
	<-w.done
}

func (w *blockWriter) flush(chunk []byte) error {
	// Only the zeros behind the image can lie behind the end: a device need not be a whole number of blocks.
	if over := w.at + int64(len(chunk)) - w.size; over >= blockSize || over > 0 && bytes.Trim(chunk[int64(len(chunk))-over:], "\x00") != nil {
		return unix.ENOSPC
	} else if over > 0 {
		chunk = chunk[:int64(len(chunk))-over]
	}
	err := w.flushChunk(chunk)
	w.at += int64(len(chunk))
	return err
}

func (w *blockWriter) flushChunk(chunk []byte) error {
	if w.pause > 0 {
		w.pause--
		return w.put(chunk, w.at)
	}
	old := w.old[:len(chunk)]
	if _, err := w.f.ReadAt(old, w.at); err != nil && err != io.EOF {
		// A block that cannot be read may well be written.
		return w.put(chunk, w.at)
	}
	same := len(chunk)
	for _, r := range differing(old, chunk) {
		if err := w.put(chunk[r[0]:r[1]], w.at+int64(r[0])); err != nil {
			return err
		}
		same -= r[1] - r[0]
	}
	w.same += int64(same)
	if same > 0 || len(chunk) == 0 {
		w.misses = 0
		return nil
	}
	w.misses++
	w.pause = min(1<<min(w.misses, 10), maxPause)
	return nil
}

// differing returns the runs [from, to) of blocks in which the two differ.
func differing(old, now []byte) (runs [][2]int) {
	for at := 0; at < len(now); at += int(blockSize) {
		end := min(at+int(blockSize), len(now))
		if bytes.Equal(old[at:end], now[at:end]) {
			continue
		}
		if n := len(runs); n > 0 && runs[n-1][1] == at {
			runs[n-1][1] = end
			continue
		}
		runs = append(runs, [2]int{at, end})
	}
	return runs
}

func (w *blockWriter) put(data []byte, at int64) error {
	if _, err := w.f.WriteAt(data, at); err != nil {
		return err
	}
	w.written += int64(len(data))
	if w.queued += int64(len(data)); w.queued >= syncEvery {
		w.queued = 0
		// Only a hint; the sync at the end is what counts.
		_ = unix.SyncFileRange(int(w.f.Fd()), 0, 0, unix.SYNC_FILE_RANGE_WRITE)
	}
	return nil
}

// discard tells the medium that nothing behind from is used. One that does not take that is left as it is.
func discard(f *os.File, from, size int64) error {
	from = (from + blockChunk - 1) / blockChunk * blockChunk
	if from >= size {
		return nil
	}
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if info.Mode().IsRegular() {
		err = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, from, size-from)
	} else {
		span := [2]uint64{uint64(from), uint64(size - from)}
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.BLKDISCARD, uintptr(unsafe.Pointer(&span)))
		if errno != 0 {
			err = errno
		}
	}
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) {
		return nil
	}
	return err
}

// slotReader reads the start of a device from the medium: past the page cache where the file system lets it, else after the
// cache was dropped.
type slotReader struct {
	f    *os.File
	buf  []byte // aligned, as O_DIRECT wants it
	rest []byte // of buf, not read yet
	at   int64
	left int64
}

func openSlotReader(path string, size int64) (*slotReader, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		if f, err = openDropped(path); err != nil {
			return nil, err
		}
	}
	return &slotReader{f: f, buf: aligned(blockChunk), left: size}, nil
}

// openDropped opens a device whose cached pages, clean since the sync, are dropped first.
func openDropped(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY, 0)
	if err != nil {
		return nil, err
	}
	dropCache(f)
	return f, nil
}

// dropCache drops clean pages. Either call may be refused: by a file that is no device, by a file system that has no cache.
func dropCache(f *os.File) {
	_, _, _ = unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.BLKFLSBUF, 0)
	_ = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
}

func aligned(n int) []byte {
	b := make([]byte, n+int(blockSize))
	skip := int(-uintptr(unsafe.Pointer(&b[0])) & uintptr(blockSize-1))
	return b[skip : skip+n]
}

func (r *slotReader) Read(p []byte) (int, error) {
	if r.left == 0 {
		return 0, io.EOF
	}
	if len(r.rest) == 0 {
		n, err := r.f.ReadAt(r.buf, r.at)
		if n == 0 && errors.Is(err, unix.EINVAL) {
			// A file system that takes the flag and then not the read.
			if err = r.reopen(); err != nil {
				return 0, err
			}
			n, err = r.f.ReadAt(r.buf, r.at)
		}
		if n == 0 {
			return 0, err
		}
		r.at += int64(n)
		r.rest = r.buf[:n]
	}
	n := copy(p[:min(int64(len(p)), r.left)], r.rest)
	r.rest = r.rest[n:]
	r.left -= int64(n)
	return n, nil
}

func (r *slotReader) reopen() error {
	f, err := openDropped(r.f.Name())
	if err != nil {
		return err
	}
	r.f.Close()
	r.f = f
	return nil
}

func (r *slotReader) Close() error { return r.f.Close() }
