package swarm

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/anacrolix/torrent/merkle"

	"meshupd/verify"
)

// lan connects devices in memory. It counts what each sends and can cut a device off without a word.
type lan struct {
	mu    sync.Mutex
	ports map[string]*port
}

type port struct {
	lan    *lan
	id     string
	accept chan arrival
	cut    atomic.Bool  // nothing passes any more, nobody is told
	sent   atomic.Int64 // bytes that left the device

	mu    sync.Mutex
	conns []net.Conn
	dead  bool
}

type arrival struct {
	conn net.Conn
	from string
}

func newLAN() *lan { return &lan{ports: map[string]*port{}} }

func (l *lan) join(id string) *port {
	l.mu.Lock()
	defer l.mu.Unlock()
	p := &port{lan: l, id: id, accept: make(chan arrival, 64)}
	l.ports[id] = p
	return p
}

func (p *port) Dial(ctx context.Context, id string) (net.Conn, error) {
	p.lan.mu.Lock()
	to := p.lan.ports[id]
	p.lan.mu.Unlock()
	if to == nil || to.gone() || p.gone() {
		return nil, errors.New("no such device")
	}
	if p.cut.Load() || to.cut.Load() {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	here, there := newPipe(p, to)
	p.keep(here)
	to.keep(there)
	select {
	case to.accept <- arrival{there, p.id}:
		return here, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (p *port) Accept(ctx context.Context) (net.Conn, string, error) {
	select {
	case a := <-p.accept:
		return a.conn, a.from, nil
	case <-ctx.Done():
		return nil, "", ctx.Err()
	}
}

func (p *port) keep(c net.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.conns = append(p.conns, c)
}

func (p *port) gone() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.dead
}

// kill closes everything, as the kernel does for a process that is killed.
func (p *port) kill() {
	p.mu.Lock()
	p.dead = true
	conns := p.conns
	p.mu.Unlock()
	for _, c := range conns {
		c.Close()
	}
}

// pipe is one direction's end of a connection with a buffer, like a socket.
type pipe struct {
	net.Conn // nil: Addr methods are not used
	in, out  *flow
	from, to *port
}

const pipeBuffer = 256 << 10

type flow struct {
	mu       sync.Mutex
	cond     *sync.Cond
	buf      []byte
	closed   bool
	deadline time.Time
	timer    *time.Timer
}

func newFlow() *flow {
	f := &flow{}
	f.cond = sync.NewCond(&f.mu)
	return f
}

func newPipe(a, b *port) (net.Conn, net.Conn) {
	ab, ba := newFlow(), newFlow()
	return &pipe{in: ba, out: ab, from: a, to: b}, &pipe{in: ab, out: ba, from: b, to: a}
}

func (p *pipe) LocalAddr() net.Addr  { return &net.TCPAddr{IP: net.IPv6loopback, Port: 1} }
func (p *pipe) RemoteAddr() net.Addr { return &net.TCPAddr{IP: net.IPv6loopback, Port: 1} }

func (p *pipe) isCut() bool { return p.from.cut.Load() || p.to.cut.Load() }

func (p *pipe) Read(b []byte) (int, error) {
	f := p.in
	f.mu.Lock()
	defer f.mu.Unlock()
	for len(f.buf) == 0 || p.isCut() {
		switch {
		case f.closed:
			return 0, io.EOF
		case !f.deadline.IsZero() && !time.Now().Before(f.deadline):
			return 0, os.ErrDeadlineExceeded
		}
		f.cond.Wait()
	}
	n := copy(b, f.buf)
	f.buf = f.buf[n:]
	f.cond.Broadcast()
	return n, nil
}

func (p *pipe) Write(b []byte) (n int, err error) {
	f := p.out
	f.mu.Lock()
	defer f.mu.Unlock()
	for len(b) > 0 {
		for !f.closed && (len(f.buf) >= pipeBuffer || p.isCut()) {
			f.cond.Wait()
		}
		if f.closed {
			return n, io.ErrClosedPipe
		}
		m := min(len(b), pipeBuffer-len(f.buf))
		f.buf = append(f.buf, b[:m]...)
		b, n = b[m:], n+m
		p.from.sent.Add(int64(m))
		f.cond.Broadcast()
	}
	return n, nil
}

func (p *pipe) Close() error {
	for _, f := range []*flow{p.in, p.out} {
		f.mu.Lock()
		f.closed = true
		if f.timer != nil {
			f.timer.Stop()
		}
		f.cond.Broadcast()
		f.mu.Unlock()
	}
	return nil
}

func (p *pipe) SetDeadline(t time.Time) error { return p.SetReadDeadline(t) }

// SetWriteDeadline fails on purpose, as some streams do: the engine must not get to see it.
func (p *pipe) SetWriteDeadline(time.Time) error {
	return errors.New("write deadlines are not for this stream")
}

func (p *pipe) SetReadDeadline(t time.Time) error {
	f := p.in
	f.mu.Lock()
	defer f.mu.Unlock()
	f.deadline = t
	if f.timer != nil {
		f.timer.Stop()
	}
	if !t.IsZero() {
		f.timer = time.AfterFunc(time.Until(t), func() {
			f.mu.Lock()
			f.cond.Broadcast()
			f.mu.Unlock()
		})
	}
	f.cond.Broadcast()
	return nil
}

// picture is an image with its verified piece table.
type picture struct {
	img   verify.Image
	table *verify.PieceTable
	data  []byte
}

func newPicture(tb testing.TB, size, piece int64, seed uint64) picture {
	tb.Helper()
	data := make([]byte, size)
	r := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
	r.Read(data)
	return pictureOf(data, piece)
}

// pictureOf is an image of these bytes.
func pictureOf(data []byte, piece int64) picture {
	size := int64(len(data))
	table := &verify.PieceTable{Length: piece, Size: size}
	for at := int64(0); at < size; at += piece {
		h := merkle.NewHash()
		h.Write(data[at:min(size, at+piece)])
		if size <= piece {
			table.Root = verify.Digest(h.Sum(nil))
			table.Hashes = append(table.Hashes, table.Root)
			break
		}
		table.Hashes = append(table.Hashes, verify.Digest(h.SumMinLength(nil, int(piece))))
	}
	if size > piece {
		pad := merkle.NewHash()
		var layer [][32]byte
		for _, h := range table.Hashes {
			layer = append(layer, h)
		}
		table.Root = merkle.RootWithPadHash(layer, [32]byte(pad.SumMinLength(nil, int(piece))))
	}
	sum := verify.Digest(sha256.Sum256(data))
	return picture{data: data, table: table, img: verify.Image{
		Name: "root", Kind: verify.KindSlot, Size: size, SHA256: sum, Encoding: verify.EncodingNone,
		Content: verify.Content{Size: size, SHA256: sum}, Pieces: verify.Pieces{Length: piece, Root: table.Root},
	}}
}

// device is a swarm with its store on a lan.
type device struct {
	*Swarm
	id    string
	dir   string
	port  *port
	store *Store
	stop  context.CancelFunc
	ended chan error
	bad   chan string
}

// town is the devices of a test and the gossip between them.
type town struct {
	tb    testing.TB
	lan   *lan
	kick  chan struct{}
	stop  context.CancelFunc
	done  chan struct{}
	mu    sync.Mutex
	alive map[string]*device
	watch []chan struct{}
	lag   time.Duration // how old a word is when it is heard; set before the first device
}

func newTown(tb testing.TB) *town {
	ctx, stop := context.WithCancel(context.Background())
	w := &town{tb: tb, lan: newLAN(), kick: make(chan struct{}, 1), stop: stop, done: make(chan struct{}), alive: map[string]*device{}}
	go w.gossip(ctx)
	tb.Cleanup(w.close)
	return w
}

func (w *town) close() {
	w.stop()
	<-w.done
	for _, d := range w.list() {
		w.leave(d)
	}
}

func (w *town) list() []*device {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.SortedFunc(maps.Values(w.alive), func(a, b *device) int { return cmpString(a.id, b.id) })
}

func cmpString(a, b string) int { return bytes.Compare([]byte(a), []byte(b)) }

// gossip hands round what devices say, and wakes those who wait for a state.
func (w *town) gossip(ctx context.Context) {
	defer close(w.done)
	for {
		select {
		case <-ctx.Done():
			return
		case <-w.kick:
		}
		if w.lag > 0 {
			select {
			case <-ctx.Done():
				return
			case <-time.After(w.lag):
			}
		}
		devices := w.list()
		said := map[string][]Holding{}
		for _, d := range devices {
			said[d.id] = d.Holdings()
		}
		for _, d := range devices {
			var members []Member
			for _, other := range devices {
				if other != d {
					members = append(members, Member{ID: other.id, Holdings: said[other.id]})
				}
			}
			d.SetMembers(members)
		}
		w.mu.Lock()
		for _, c := range w.watch {
			select {
			case c <- struct{}{}:
			default:
			}
		}
		w.mu.Unlock()
	}
}

func (w *town) changed() {
	select {
	case w.kick <- struct{}{}:
	default:
	}
}

type option func(*Config)

func upLimit(n int64) option { return func(c *Config) { c.UpLimit = n } }

// add starts a device; dir is its store, "" for a new one.
func (w *town) add(id, dir string, opts ...option) *device {
	w.tb.Helper()
	if dir == "" {
		dir = w.tb.TempDir()
	}
	store, err := OpenStore(StoreConfig{Dir: dir})
	if err != nil {
		w.tb.Fatal(err)
	}
	d := &device{id: id, dir: dir, port: w.lan.join(id), store: store, ended: make(chan error, 1), bad: make(chan string, 64)}
	cfg := Config{Self: id, Store: store, Network: d.port, Changed: w.changed, BadPeer: func(id string, _ verify.Digest) {
		select {
		case d.bad <- id:
		default:
		}
	}}
	if testing.Verbose() {
		cfg.Log = slog.New(slog.NewTextHandler(w.tb.Output(), &slog.HandlerOptions{Level: slog.LevelDebug})).With("at", id)
	}
	for _, o := range opts {
		o(&cfg)
	}
	d.Swarm, err = New(cfg)
	if err != nil {
		w.tb.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	d.stop = stop
	go func() { d.ended <- d.Run(ctx) }()
	w.mu.Lock()
	w.alive[id] = d
	w.mu.Unlock()
	w.changed()
	return d
}

// leave ends a device in good order.
func (w *town) leave(d *device) {
	w.mu.Lock()
	delete(w.alive, d.id)
	w.mu.Unlock()
	d.stop()
	if err := <-d.ended; err != nil {
		w.tb.Errorf("%s: %v", d.id, err)
	}
	d.port.kill()
	w.changed()
}

// until waits for a state, or fails the test after a generous time.
func (w *town) until(what string, ok func() bool) {
	w.tb.Helper()
	c := make(chan struct{}, 1)
	w.mu.Lock()
	w.watch = append(w.watch, c)
	w.mu.Unlock()
	deadline := time.After(60 * time.Second)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-c:
		case <-tick.C:
		case <-deadline:
			for _, d := range w.list() {
				for _, t := range d.Transfers() {
					w.tb.Logf("%s: %d of %d, parent %q, err %v, received %v", d.id, t.Done, t.Size, t.Parent, t.Err, t.Received)
				}
			}
			w.tb.Fatalf("waited in vain until %s", what)
		}
	}
}

// seed stores the picture on a device and serves it.
func (w *town) seed(d *device, p picture) {
	w.tb.Helper()
	if err := d.store.put(context.Background(), p.img, bytes.NewReader(p.data), nil); err != nil {
		w.tb.Fatal(err)
	}
	d.start(p.img, p.table)
	w.changed()
}

func (w *town) allHave(p picture, devices ...*device) {
	w.tb.Helper()
	w.until("all devices have the image", func() bool {
		for _, d := range devices {
			if !d.store.Has(p.img.SHA256) {
				return false
			}
		}
		return true
	})
	for _, d := range devices {
		got, err := os.ReadFile(d.store.imagePath(p.img.SHA256))
		if err != nil || !bytes.Equal(got, p.data) {
			w.tb.Errorf("%s: stored image differs (%v)", d.id, err)
		}
	}
}

func (d *device) transfer(p picture) Transfer {
	for _, t := range d.Transfers() {
		if t.Image == p.img.SHA256 {
			return t
		}
	}
	return Transfer{}
}

func sum(m map[string]int64) (n int64) {
	for _, v := range m {
		n += v
	}
	return n
}

func names(n int) (ids []string) {
	for i := range n {
		ids = append(ids, fmt.Sprintf("device-%d", i))
	}
	return ids
}
