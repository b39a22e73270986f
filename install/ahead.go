package install

import "io"

// aheadChunks is how many chunks a reader may be ahead.
const aheadChunks = 3

// ahead reads in a goroutine of its own, so that reading or decoding goes on while the caller hashes and the medium writes.
// What it reads from must not be used before close has returned, and may be used then.
type ahead struct {
	full chan aheadChunk
	free chan []byte
	stop chan struct{}
	done chan struct{}

	// Owned by Read.
	now  aheadChunk
	rest []byte // of now, not read yet
}

type aheadChunk struct {
	data []byte
	err  error // comes after data, and is the last
}

func readAhead(r io.Reader) *ahead {
	a := &ahead{full: make(chan aheadChunk, aheadChunks), free: make(chan []byte, aheadChunks), stop: make(chan struct{}), done: make(chan struct{})}
	for range aheadChunks {
		a.free <- make([]byte, chunk)
	}
	go a.work(r)
	return a
}

func (a *ahead) work(r io.Reader) {
	defer close(a.done)
	for {
		var buf []byte
		select {
		case buf = <-a.free:
		case <-a.stop:
			return
		}
		n, err := r.Read(buf[:chunk])
		a.full <- aheadChunk{buf[:n], err} // there is room for every buffer
		if err != nil {
			return
		}
	}
}

// Read implements io.Reader.
func (a *ahead) Read(p []byte) (int, error) {
	for len(a.rest) == 0 {
		if a.now.err != nil {
			return 0, a.now.err
		}
		if a.now.data != nil {
			a.free <- a.now.data[:chunk]
		}
		a.now = <-a.full
		a.rest = a.now.data
	}
	n := copy(p, a.rest)
	a.rest = a.rest[n:]
	return n, nil
}

// close waits until what is read from is no more in use. It may be called again.
func (a *ahead) close() {
	select {
	case <-a.done:
		return
	default:
	}
	close(a.stop)
	<-a.done
}
