package peer

import (
	"context"
	"crypto/sha256"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"meshupd/discovery"
	"meshupd/verify"
)

// testMesh is a mesh whose documents are plain bytes: a head is believed unless
// it says "forged" or "late".
type testMesh struct {
	*Mesh
	t       *testing.T
	cancel  context.CancelFunc
	ended   chan error
	changes chan struct{}

	mu     sync.Mutex
	heads  map[verify.Digest][]byte
	asked  int
	hinted chan discovery.Hint
}

// fakeFinder yields what a test sends.
type fakeFinder struct{ hints chan discovery.Hint }

func (f fakeFinder) Run(ctx context.Context, found func(discovery.Hint)) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case h := <-f.hints:
			found(h)
		}
	}
}

func testLog(name string) *slog.Logger {
	if os.Getenv("MESH_TEST_LOG") == "" {
		return slog.New(slog.DiscardHandler)
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug})).With("on", name)
}

// startMesh runs a mesh until the test ends. edit may change its configuration.
func startMesh(t *testing.T, edit func(*MeshConfig)) *testMesh {
	t.Helper()
	m := newTestMesh(t, t.TempDir(), edit)
	m.start()
	t.Cleanup(m.stop)
	return m
}

func newTestMesh(t *testing.T, dir string, edit func(*MeshConfig)) *testMesh {
	t.Helper()
	m := &testMesh{t: t, changes: make(chan struct{}, 1), heads: map[verify.Digest][]byte{}, hinted: make(chan discovery.Hint, 256)}
	cfg := MeshConfig{
		StateDir: dir,
		Group:    verify.Digest{1},
		Listen:   []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:0")},
		Finders:  func(discovery.Advert) []Finder { return []Finder{fakeFinder{m.hinted}} },
		Log:      testLog(t.Name()),
		Changed: func() {
			select {
			case m.changes <- struct{}{}:
			default:
			}
		},
		CheckHead: m.checkHead,
		Heads:     m.refs,
		Head:      m.head,
	}
	if edit != nil {
		edit(&cfg)
	}
	mesh, err := NewMesh(cfg)
	if err != nil {
		t.Fatal(err)
	}
	m.Mesh = mesh
	return m
}

func (m *testMesh) start() {
	ctx, cancel := context.WithCancel(context.Background())
	m.cancel, m.ended = cancel, make(chan error, 1)
	go func() { m.ended <- m.Run(ctx) }()
	select {
	case <-m.started:
	case err := <-m.ended:
		m.ended <- err
		m.t.Fatalf("the mesh ended: %v", err)
	}
}

func (m *testMesh) stop() {
	m.cancel()
	if err := <-m.ended; err != nil {
		m.t.Errorf("the mesh ended with %v", err)
	}
	m.ended <- nil
}

// sees tells m where other is, as discovery would.
func (m *testMesh) sees(other *testMesh) {
	m.hinted <- discovery.Hint{ID: other.ID(), Addrs: other.Addrs(), Via: "test"}
}

// until waits for a state of the mesh.
func (m *testMesh) until(what string, cond func() bool) {
	m.t.Helper()
	deadline := time.After(3 * time.Minute)
	for !cond() {
		select {
		case <-m.changes:
		case <-time.After(20 * time.Millisecond):
		case <-deadline:
			m.t.Fatalf("%s did not come true; members: %+v", what, m.Members())
		}
	}
}

func (m *testMesh) member(id string) (Member, bool) {
	for _, x := range m.Members() {
		if x.ID == id {
			return x, true
		}
	}
	return Member{}, false
}

func (m *testMesh) connectedTo(id string) bool {
	x, ok := m.member(id)
	return ok && x.Connected
}

// checks is how many heads were checked.
func (m *testMesh) checks() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.asked
}

func (m *testMesh) checkHead(_ context.Context, _ string, head []byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.asked++
	switch {
	case len(head) >= 6 && string(head[:6]) == "forged":
		return verify.Refuse(verify.CodeSigBad, "forged")
	case len(head) >= 4 && string(head[:4]) == "late":
		return verify.Refuse(verify.CodeOrder, "late")
	}
	m.heads[sha256.Sum256(head)] = head
	return nil
}

func (m *testMesh) hold(head []byte) verify.Digest {
	m.mu.Lock()
	defer m.mu.Unlock()
	id := verify.Digest(sha256.Sum256(head))
	m.heads[id] = head
	return id
}

func (m *testMesh) holds(id verify.Digest) bool { return m.head(id) != nil }

func (m *testMesh) head(id verify.Digest) []byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.heads[id]
}

func (m *testMesh) refs() []HeadRef {
	m.mu.Lock()
	defer m.mu.Unlock()
	list := []HeadRef{}
	for id := range m.heads {
		list = append(list, HeadRef{ID: id, Line: 1, Seq: 1})
	}
	slices.SortFunc(list, func(a, b HeadRef) int { return slices.Compare(a.ID[:], b.ID[:]) })
	return list
}

func TestTwoDevicesAdmitEachOther(t *testing.T) {
	a, b := startMesh(t, nil), startMesh(t, nil)
	a.Tell(DeviceStatus{Name: "alpha", State: "idle"})
	b.Tell(DeviceStatus{Name: "beta", State: "idle"})
	id := a.hold([]byte("a head that a had from the start"))
	a.sees(b)
	a.until("b said who it is", func() bool { m, _ := a.member(b.ID()); return m.Connected && m.Status.Name == "beta" })
	b.until("a said who it is", func() bool { m, _ := b.member(a.ID()); return m.Connected && m.Status.Name == "alpha" })
	b.until("b holds the head", func() bool { return b.holds(id) })
}

func TestDevicesOfAnotherSiteStayOut(t *testing.T) {
	key := func(s string) func(*MeshConfig) {
		return func(c *MeshConfig) { c.SiteKey = []byte(s) }
	}
	tests := []struct {
		name string
		a, b func(*MeshConfig)
	}{
		{"group", nil, func(c *MeshConfig) { c.Group = verify.Digest{2} }},
		{"site key", key("a key of the one site"), key("a key of another one")},
		{"key and none", key("a key of the one site"), nil},
		{"none and key", nil, key("a key of the one site")},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			a, b := startMesh(t, tt.a), startMesh(t, tt.b)
			a.Tell(DeviceStatus{Name: "alpha"})
			b.Tell(DeviceStatus{Name: "beta"})
			a.sees(b)
			a.until("a rejects b", func() bool { return a.adm.rejections(b.self) > 0 })
			b.until("b rejects a", func() bool { return b.adm.rejections(a.self) > 0 })
			b.until("the connection is closed", func() bool { return len(b.host.Network().Peers()) == 0 })
			if len(a.Members()) != 0 || len(b.Members()) != 0 {
				t.Errorf("members: %v and %v", a.Members(), b.Members())
			}
		})
	}
}

func TestSameSiteKeyAdmits(t *testing.T) {
	keyed := func(c *MeshConfig) { c.SiteKey = []byte("a key of the one site") }
	a, b := startMesh(t, keyed), startMesh(t, keyed)
	a.sees(b)
	a.until("a admits b", func() bool { return a.connectedTo(b.ID()) })
	b.until("b admits a", func() bool { return b.connectedTo(a.ID()) })
}

func TestTwelveDevicesOnIPv6(t *testing.T) {
	var site []*testMesh
	for range 12 {
		site = append(site, startMesh(t, func(c *MeshConfig) {
			c.Listen = []netip.AddrPort{netip.MustParseAddrPort("[::1]:0")}
		}))
	}
	for _, m := range site[1:] {
		m.sees(site[0]) // the rest they learn from each other
	}
	for i, m := range site {
		m.Tell(DeviceStatus{Name: fmt.Sprint("device ", i), State: "idle"})
	}
	for _, m := range site {
		m.until("all are connected and known by name", func() bool {
			n := 0
			for _, x := range m.Members() {
				if x.Connected && x.Status.Name != "" {
					n++
				}
			}
			return n == len(site)-1
		})
	}
	id := site[3].hold([]byte("news"))
	if err := site[3].docs.spread(t.Context(), []byte("news")); err != nil {
		t.Fatal(err)
	}
	for _, m := range site {
		m.until("the head is everywhere", func() bool { return m.holds(id) })
	}
}

// A device that knows nothing but an address asks who is there.
func TestSeedIsEnough(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		site := onLAN(t, newMemLAN(), "10.0.0.1", "10.0.0.2")
		defer stopAll(site)
		a, b := site[0], site[1]
		a.hinted <- discovery.Hint{Addrs: b.Addrs(), Via: "seed"}
		a.hinted <- discovery.Hint{Addrs: a.Addrs(), Via: "seed"} // a list for the whole site names this device, too
		a.until("a found b", func() bool { return a.connectedTo(b.ID()) })
		b.until("b found a", func() bool { return b.connectedTo(a.ID()) })
	})
}

func TestRestartedDeviceIsHeardAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lan := newMemLAN()
		site := onLAN(t, lan, "10.0.0.1", "10.0.0.2")
		a, b := site[0], site[1]
		defer stopAll(site[:1])
		b.Tell(DeviceStatus{Name: "b", State: "idle"})
		a.sees(b)
		a.until("b is known", func() bool { m, _ := a.member(b.ID()); return m.Status.State == "idle" })
		b.stop()
		a.until("b is gone", func() bool { return !a.connectedTo(b.ID()) })
		again := newTestMesh(t, b.cfg.StateDir, func(c *MeshConfig) { c.LAN, c.Listen = b.cfg.LAN, b.cfg.Listen })
		again.start()
		defer again.stop()
		if again.ID() != b.ID() {
			t.Fatal("a restart made another device")
		}
		again.Tell(DeviceStatus{Name: "b", State: "confirmed"})
		a.until("b is heard again", func() bool {
			m, _ := a.member(b.ID())
			return m.Connected && m.Status.State == "confirmed" && m.Status.Boot == 2
		})
	})
}

func TestNoGoroutinesStay(t *testing.T) {
	before := goleak.IgnoreCurrent()
	a, b := newTestMesh(t, t.TempDir(), nil), newTestMesh(t, t.TempDir(), nil)
	a.start()
	b.start()
	a.sees(b)
	a.until("a admits b", func() bool { return a.connectedTo(b.ID()) })
	a.stop()
	b.stop()
	if err := goleak.Find(before,
		goleak.IgnoreTopFunction("github.com/libp2p/go-libp2p-pubsub.(*PubSub).handleSendingMessages"), // ends with its stream's reset, which it may see late
	); err != nil {
		t.Error(err)
	}
}
