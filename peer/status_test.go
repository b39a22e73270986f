package peer

import (
	"bytes"
	"math"
	"strings"
	"testing"
	"testing/synctest"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/peer"

	"meshupd/swarm"
	"meshupd/verify"
)

func testKey(t testing.TB) (crypto.PrivKey, peer.ID) {
	t.Helper()
	key, err := loadIdentity(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	id, err := peer.IDFromPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return key, id
}

var group = verify.Digest{1}

func TestStatusIsWhatItsAuthorSaid(t *testing.T) {
	key, id := testKey(t)
	said := DeviceStatus{
		Name: "kiosk-14", Boot: 3, N: 9, State: "fetching", Since: time.Unix(1700000000, 0).UTC(),
		Reason:   &Reason{Code: verify.CodeSpace, NeedBytes: 12},
		Heads:    []HeadRef{{ID: verify.Digest{7}, Line: 1, Seq: 2}},
		Holdings: []swarm.Holding{{Image: verify.Digest{8}, Rank: 1, Have: 5}},
		Sent:     map[string]int64{verify.Digest{8}.String(): 4},
		Addrs:    []string{"10.0.0.1:7610"},
	}
	signed, err := signStatus(key, group, said)
	if err != nil {
		t.Fatal(err)
	}
	who, heard, err := openStatus(group, signed)
	if err != nil || who != id {
		t.Fatalf("%v said it, %v", who, err)
	}
	if heard.Name != said.Name || heard.Reason.NeedBytes != 12 || heard.Heads[0] != said.Heads[0] || heard.Holdings[0] != said.Holdings[0] ||
		heard.Sent[verify.Digest{8}.String()] != 4 || !heard.Since.Equal(said.Since) {
		t.Errorf("heard %+v", heard)
	}
	if _, _, err := openStatus(verify.Digest{2}, signed); err == nil {
		t.Error("the status of one product is taken for one of another")
	}
	for i := range signed {
		forged := bytes.Clone(signed)
		forged[i] ^= 1
		if who, _, err := openStatus(group, forged); err == nil && who == id {
			t.Fatalf("a change of byte %d was not noticed", i)
		}
	}
	for n := range signedStatusHeader {
		if _, _, err := openStatus(group, signed[:n]); err == nil {
			t.Fatalf("%d bytes were taken", n)
		}
	}
}

func TestStatusIsCleaned(t *testing.T) {
	key, _ := testKey(t)
	signed, err := signStatus(key, group, DeviceStatus{
		Name: "a\x1b[31mb\u202ec\nd\xff" + strings.Repeat("é", 100), State: "s", Done: -1, Rate: math.Inf(1),
		From: make([]string, 100), Heads: make([]HeadRef, 1000), Holdings: make([]swarm.Holding, 1000),
		Reason: &Reason{Detail: strings.Repeat("x", 10000), NeedBytes: -1}, Since: time.Date(20000, 1, 1, 0, 0, 0, 0, time.UTC),
		Sent: map[string]int64{"not a digest": 1},
	})
	if err != nil {
		t.Fatal(err)
	}
	_, s, err := openStatus(group, signed)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(s.Name, "a[31mbcd") || len(s.Name) > maxName || !utf8.ValidString(s.Name) {
		t.Errorf("name %q", s.Name)
	}
	if s.Done != 0 || s.Rate != 0 || len(s.Reason.Detail) != maxDetail || s.Reason.NeedBytes != 0 || s.Sent != nil || len(s.From) != 0 {
		t.Errorf("%+v", s)
	}
	if len(signed) > maxSignedStatus || len(s.Heads) > maxRefs {
		t.Errorf("%d bytes, %d heads", len(signed), len(s.Heads))
	}
}

func TestRoster(t *testing.T) {
	r, now := newRoster(), time.Now()
	say := func(boot, n uint64) DeviceStatus { return DeviceStatus{Boot: boot, N: n} }
	steps := []struct {
		what string
		s    DeviceStatus
		want bool
	}{
		{"first", say(2, 5), true},
		{"replay", say(2, 5), false},
		{"older", say(2, 4), false},
		{"newer", say(2, 6), true},
		{"of an earlier start", say(1, 100), false},
		{"of a later start", say(3, 1), true},
	}
	for _, st := range steps {
		if got := r.hear("x", nil, st.s, now, 0); got != st.want {
			t.Errorf("%s: %v", st.what, got)
		}
	}
	r.hear("x", nil, say(3, 2), now.Add(time.Second), time.Hour)
	if m := r.members(nil, now); !m[0].LastHeard.Equal(now) {
		t.Errorf("a claimed age made the device silent since %v", now.Sub(m[0].LastHeard))
	}
	if r.forget(now.Add(forgetTime)); len(r.members(nil, now)) != 1 {
		t.Error("forgotten too early")
	}
	if r.forget(now.Add(2 * forgetTime)); len(r.members(nil, now)) != 0 {
		t.Error("never forgotten")
	}
	for i := range maxMembers + 10 {
		r.hear(peer.ID(rune(i)), nil, say(1, 1), now.Add(time.Duration(i)), 0)
	}
	if n := len(r.members(nil, now)); n != maxMembers {
		t.Errorf("%d members", n)
	}
}

func TestTellAt(t *testing.T) {
	sent := time.Now()
	tests := []struct {
		name          string
		sent          time.Time
		dirty, urgent bool
		want          time.Duration
	}{
		{"unchanged", sent, false, false, heartbeatMin},
		{"numbers changed", sent, true, false, tellGap},
		{"state changed", sent, true, true, tellUrgent},
	}
	for _, tt := range tests {
		if got := tellAt(tt.sent, tt.dirty, tt.urgent, tellGap, heartbeatMin).Sub(sent); got != tt.want {
			t.Errorf("%s: after %v", tt.name, got)
		}
	}
	if !tellAt(time.Time{}, false, false, tellGap, heartbeatMin).IsZero() {
		t.Error("the first status waits")
	}
}

// A device that tells a hundred times a second is heard about once, and a change of state at once.
func TestTellIsCoalesced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		site := onLAN(t, newMemLAN(), "10.0.0.1", "10.0.0.2")
		defer stopAll(site)
		a, b := site[0], site[1]
		a.Tell(DeviceStatus{Name: "a", State: "idle"})
		b.sees(a)
		b.until("a is known", func() bool { m, _ := b.member(a.ID()); return m.Status.Name == "a" })
		time.Sleep(3 * time.Second)
		first, _ := b.member(a.ID())
		for i := range 500 {
			a.Tell(DeviceStatus{Name: "a", State: "fetching", Done: int64(i)})
			time.Sleep(10 * time.Millisecond)
			if m, _ := b.member(a.ID()); i == 20 && m.Status.State != "fetching" {
				t.Error("the change of state took more than 200 ms")
			}
		}
		time.Sleep(2 * time.Second)
		last, _ := b.member(a.ID())
		if last.Status.Done != 499 {
			t.Errorf("the newest did not win: %+v", last.Status)
		}
		if n := last.Status.N - first.Status.N; n > 9 {
			t.Errorf("%d messages for five seconds", n)
		}
	})
}

func TestForgedStatusIsDropped(t *testing.T) {
	m := newTestMesh(t, t.TempDir(), nil)
	key, id := testKey(t)
	one, err := signStatus(key, group, DeviceStatus{Name: "one", Boot: 1, N: 1})
	if err != nil {
		t.Fatal(err)
	}
	two, err := signStatus(key, group, DeviceStatus{Name: "two", Boot: 1, N: 2})
	if err != nil {
		t.Fatal(err)
	}
	spliced := append(bytes.Clone(one[:signedStatusHeader]), two[signedStatusHeader:]...)
	if _, _, err := m.hearStatus(spliced, 0); err == nil {
		t.Error("a status under the signature of another one was taken")
	}
	for i, step := range []struct {
		signed []byte
		news   bool
	}{{two, true}, {one, false}, {two, false}} {
		if news, _, err := m.hearStatus(step.signed, 0); news != step.news || err != nil {
			t.Errorf("step %d: %v, %v", i, news, err)
		}
	}
	if x, ok := m.member(id.String()); !ok || x.Status.Name != "two" {
		t.Errorf("%+v", x)
	}
	m.Ban(id.String(), nil)
	if _, _, err := m.hearStatus(two, 0); err == nil {
		t.Error("a banned device is heard")
	}
}

func TestLostStartCounterCatchesUp(t *testing.T) {
	m := newTestMesh(t, t.TempDir(), nil)
	old, err := signStatus(m.key, group, DeviceStatus{Boot: 40, N: 3})
	if err != nil {
		t.Fatal(err)
	}
	if news, _, err := m.hearStatus(old, 0); news || err != nil {
		t.Fatal(news, err)
	}
	m.Tell(DeviceStatus{Name: "me"})
	signed, err := m.teller.sign(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if _, s, _ := openStatus(group, signed); s.Boot != 41 {
		t.Errorf("boot %d", s.Boot)
	}
	if n, err := countBoot(m.cfg.StateDir); n != 42 || err != nil {
		t.Errorf("the next start is %d, %v", n, err)
	}
}

func FuzzStatus(f *testing.F) {
	key, _ := testKey(f)
	signed, err := signStatus(key, group, DeviceStatus{Name: "n", Boot: 1, N: 1, Since: time.Unix(1, 0), Reason: &Reason{Code: "E-IO"}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(signed)
	f.Add(signed[signedStatusHeader:])
	f.Add([]byte(`{"name":"\u0000\u202e","since":"9999-12-31T23:59:59-23:59","rate":1e999}`))
	f.Add([]byte(`{"since":"0000-01-01T00:00:00Z","holdings":[{"rank":1,"have":-5}],"sent":{"x":1},"addrs":["[fe80::1%a]:1"]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, _, err := openStatus(group, b); err == nil && !bytes.HasPrefix(b, []byte{signedStatusVersion}) {
			t.Fatal("an unknown version was read")
		}
		s, err := parseStatus(b)
		if err != nil {
			return
		}
		if _, err := encodeStatus(s); err != nil {
			t.Fatalf("what was read cannot be said again: %v", err)
		}
		for _, text := range append([]string{s.Name, s.State, s.Version, s.Target, s.Hardware, s.Source}, s.From...) {
			if strings.ContainsFunc(text, func(r rune) bool { return !unicode.IsPrint(r) }) || !utf8.ValidString(text) {
				t.Fatalf("%q", text)
			}
		}
		for _, at := range s.dialable(true) {
			if at.Port() < 1024 || at.Addr().Zone() != "" {
				t.Fatal(at)
			}
		}
	})
}
