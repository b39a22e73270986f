package peer

import (
	"bytes"
	"io"
	"net"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"

	"meshupd/verify"
)

func hellos(t *testing.T, a, b credential, idA, idB, idAseenByB peer.ID) (errA, errB error) {
	t.Helper()
	x, y := net.Pipe()
	deadline := time.Now().Add(10 * time.Second)
	x.SetDeadline(deadline)
	y.SetDeadline(deadline)
	done := make(chan error, 1)
	go func() {
		err := b.greetAsListener(y, idB, idAseenByB)
		y.Close()
		done <- err
	}()
	errA = a.greetAsDialler(x, idA, idB)
	x.Close()
	return errA, <-done
}

func TestHello(t *testing.T) {
	cred := func(group byte, key string) credential {
		var k []byte
		if key != "" {
			k = []byte(key)
		}
		c, err := newCredential(verify.Digest{group}, k)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	const one, two = "the key of the first site", "the key of the second site"
	tests := []struct {
		name         string
		a, b         credential
		seen         peer.ID
		codeA, codeB verify.Code
	}{
		{"same group", cred(1, ""), cred(1, ""), "a", "", ""},
		{"same key", cred(1, one), cred(1, one), "a", "", ""},
		{"other group", cred(1, one), cred(2, one), "a", verify.CodeProduct, verify.CodeProduct},
		{"other key", cred(1, one), cred(1, two), "a", verify.CodeAdmission, verify.CodeAdmission},
		{"key against none", cred(1, one), cred(1, ""), "a", verify.CodeAdmission, verify.CodeAdmission},
		{"another identity than the one that proves", cred(1, one), cred(1, one), "m", verify.CodeAdmission, verify.CodeAdmission},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			errA, errB := hellos(t, tt.a, tt.b, "a", "b", tt.seen)
			if verify.CodeOf(errA) != tt.codeA || verify.CodeOf(errB) != tt.codeB {
				t.Errorf("dialler %v, listener %v", errA, errB)
			}
		})
	}
}

// A proof of the other side is none of ours: roles are part of it.
func TestReflectedHello(t *testing.T) {
	c, err := newCredential(verify.Digest{1}, []byte("the key of the only site"))
	if err != nil {
		t.Fatal(err)
	}
	x, y := net.Pipe()
	go func() {
		io.Copy(y, y) // an echo: our own hello and our own proof come back
		y.Close()
	}()
	defer x.Close()
	errs := make(chan error, 1)
	go func() { errs <- c.greetAsDialler(&buffered{Conn: x}, "a", "b") }()
	if err := <-errs; verify.CodeOf(err) != verify.CodeAdmission {
		t.Errorf("an echo was admitted: %v", err)
	}
}

// buffered lets a write return before the echo reads.
type buffered struct{ net.Conn }

func (b *buffered) Write(p []byte) (int, error) {
	p = bytes.Clone(p)
	go b.Conn.Write(p)
	return len(p), nil
}

func TestShortSiteKeyIsRefused(t *testing.T) {
	for _, key := range [][]byte{{}, []byte("short")} {
		if _, err := NewMesh(MeshConfig{StateDir: t.TempDir(), SiteKey: key}); verify.CodeOf(err) != verify.CodeConfig {
			t.Errorf("%q: %v", key, err)
		}
	}
}

func TestAdvertTag(t *testing.T) {
	one, _ := newCredential(verify.Digest{1}, []byte("the key of the first site"))
	two, _ := newCredential(verify.Digest{1}, []byte("the key of the second site"))
	none, _ := newCredential(verify.Digest{1}, nil)
	tag := one.tag()
	if !one.matches(tag) || two.matches(tag) || none.matches(tag) {
		t.Error("a tag is known by its site and by no other")
	}
	if one.tag() == tag {
		t.Error("tags do not change, so that a device can be followed by them")
	}
	for _, bad := range []string{"", "00", tag[:31], tag + "0", "zz" + tag[2:]} {
		if one.matches(bad) {
			t.Errorf("%q matches", bad)
		}
	}
}

// A device that connects and says nothing is closed, and may not open anything else.
func TestSilentDeviceIsClosed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lan := newMemLAN()
		site := onLAN(t, lan, "10.0.0.1")
		defer stopAll(site)
		m := site[0]
		key, id := testKey(t)
		stranger, err := newHost(key, lan.at(netip.MustParseAddr("10.0.0.66")), 8, newAdmission(credential{}, id, testLog("stranger")))
		if err != nil {
			t.Fatal(err)
		}
		defer stranger.Close()
		if err := stranger.reach(t.Context(), m.self, m.Addrs()); err != nil {
			t.Fatal(err)
		}
		for _, proto := range []protocol.ID{btProtocol, headProtocol, syncProtocol, gossipProtocol} {
			s, err := stranger.NewStream(t.Context(), m.self, proto)
			if err != nil {
				continue // refused at once is fine, too
			}
			if n, err := s.Read(make([]byte, 1)); n != 0 || err == nil {
				t.Errorf("%s: read %d bytes, %v", proto, n, err)
			}
		}
		m.until("the stranger is rejected", func() bool { return m.adm.rejections(id) > 0 })
		m.until("the stranger is gone", func() bool { return len(m.host.Network().Peers()) == 0 })
		if len(m.Members()) != 0 {
			t.Errorf("members %v", m.Members())
		}
	})
}

func FuzzHello(f *testing.F) {
	f.Add(hello{group: verify.Digest{1}}.bytes())
	f.Add([]byte{})
	f.Add(bytes.Repeat([]byte{1}, helloSize))
	f.Add(bytes.Repeat([]byte{255}, helloSize+1))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := parseHello(b)
		if err == nil && !bytes.Equal(h.bytes(), b) {
			t.Fatalf("%x is not %x", h.bytes(), b)
		}
		c, _ := newCredential(verify.Digest{1}, nil)
		rw := struct {
			io.Reader
			io.Writer
		}{bytes.NewReader(b), io.Discard}
		if c.greetAsDialler(rw, "a", "b") == nil || c.greetAsListener(rw, "b", "a") == nil {
			t.Fatal("canned bytes were admitted")
		}
	})
}
