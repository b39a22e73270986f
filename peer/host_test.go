package peer

import (
	"crypto/x509"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/network"

	"meshupd/verify"
)

func TestIdentityIsKept(t *testing.T) {
	dir := t.TempDir()
	one, err := loadIdentity(dir)
	if err != nil {
		t.Fatal(err)
	}
	two, err := loadIdentity(dir)
	if err != nil || !one.Equals(two) {
		t.Fatalf("the identity changed, %v", err)
	}
	path := filepath.Join(dir, identityFile)
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name string
		raw  []byte
		mode os.FileMode
	}{
		{"others may read it", good, 0o644},
		{"cut", good[:len(good)-1], 0o600},
		{"empty", nil, 0o600},
		{"something else", []byte("-----BEGIN PRIVATE KEY-----"), 0o600},
		{"endless", make([]byte, 1<<20), 0o600},
	}
	for _, tt := range tests {
		if err := os.WriteFile(path, tt.raw, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, tt.mode); err != nil {
			t.Fatal(err)
		}
		if _, err := loadIdentity(dir); verify.CodeOf(err) != verify.CodeKey {
			t.Errorf("%s: %v", tt.name, err)
		}
		if raw, _ := os.ReadFile(path); string(raw) != string(tt.raw) {
			t.Errorf("%s: the file was replaced", tt.name)
		}
	}
}

func TestStartsAreCounted(t *testing.T) {
	dir := t.TempDir()
	for want := uint64(1); want < 4; want++ {
		if n, err := countBoot(dir); n != want || err != nil {
			t.Fatalf("%d, %v", n, err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, bootFile), []byte("rubbish"), 0o600); err != nil {
		t.Fatal(err)
	}
	if n, err := countBoot(dir); n != 1 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
}

// libp2p's defaults admit 8 of these; see newLimits.
func TestFortyNeighboursInOnePrefix(t *testing.T) {
	for _, form := range []string{"[fe80::1:%x%%eth0]:7610", "[fd00::%x]:7610", "[2001:db8::%x]:7610", "10.0.0.%d:7610"} {
		limits, err := newLimits(defaultMaxPeers)
		if err != nil {
			t.Fatal(err)
		}
		for i := range 40 {
			at, err := plainMultiaddr(netip.MustParseAddrPort(fmt.Sprintf(form, i+1)))
			if err != nil {
				t.Fatal(err)
			}
			scope, err := limits.OpenConnection(network.DirInbound, true, at)
			if err != nil {
				t.Fatalf("neighbour %d of 40 is refused: %v", i+1, err)
			}
			_, id := testKey(t)
			if err := scope.SetPeer(id); err != nil {
				t.Fatalf("neighbour %d of 40 is refused: %v", i+1, err)
			}
		}
		limits.Close()
	}
}

func TestOneAddressCannotTakeAllConnections(t *testing.T) {
	limits, err := newLimits(defaultMaxPeers)
	if err != nil {
		t.Fatal(err)
	}
	defer limits.Close()
	at, err := plainMultiaddr(netip.MustParseAddrPort("10.0.0.66:7610"))
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for range 4 * defaultMaxPeers {
		if _, err := limits.OpenConnection(network.DirInbound, true, at); err == nil {
			n++
		}
	}
	if n == 0 || n > defaultMaxPeers/2 {
		t.Errorf("%d connections from one address", n)
	}
}

// A device whose clock says 1970 and one whose clock is right accept each other.
func TestCertificateIsValidAtAnyTime(t *testing.T) {
	key, _ := testKey(t)
	secure, err := newClocklessTLS(key, nil)
	if err != nil {
		t.Fatal(err)
	}
	config, _ := secure.config("")
	cert, err := x509.ParseCertificate(config.Certificates[0].Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(cert)
	cert.UnhandledCriticalExtensions = nil
	for _, now := range []time.Time{time.Unix(0, 0), time.Now(), time.Date(2150, 1, 1, 0, 0, 0, 0, time.UTC)} {
		if _, err := cert.Verify(x509.VerifyOptions{Roots: roots, CurrentTime: now}); err != nil {
			t.Errorf("at %v: %v", now, err)
		}
	}
}

// What the mesh needs of libp2p must not bring transports that it never uses.
func TestNoUnusedTransportsAreLinked(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", "-f", "{{if not .Standard}}{{.ImportPath}}{{end}}", ".").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	for line := range strings.Lines(string(out)) {
		if path := strings.TrimSpace(line); strings.HasPrefix(path, "github.com/quic-go/") || path == "github.com/libp2p/go-libp2p" {
			t.Errorf("%s is linked", path)
		}
	}
}
