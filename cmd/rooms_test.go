// Package cmd_test keeps the arrows between the rooms.
package cmd_test

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// mayImport names, for each room, the rooms below it. What is not listed is forbidden.
var mayImport = map[string][]string{
	"cmd":       {"peer", "discovery", "swarm", "install", "verify", "simnet"},
	"peer":      {"discovery", "swarm", "install", "verify"},
	"discovery": {"verify"},
	"swarm":     {"verify"},
	"install":   {"verify"},
	"verify":    {},
	"simnet":    {},
	// The fleet runs whole devices on a virtual site, so it stands above all but cmd.
	"simnet/fleet": {"peer", "discovery", "swarm", "install", "verify", "simnet"},
	"packaging":    {"cmd"},
}

// keeper names the one room that imports a library. Its tests may use it too, nobody else may.
var keeper = map[string]string{
	"github.com/ProtonMail/go-crypto":      "verify",
	"github.com/hashicorp/mdns":            "discovery",
	"github.com/anacrolix/torrent":         "swarm",
	"github.com/libp2p/go-libp2p":          "peer",
	"github.com/libp2p/go-libp2p-pubsub":   "peer",
	"github.com/multiformats/go-multiaddr": "peer",
	"github.com/vishvananda/netlink":       "simnet",
	"github.com/vishvananda/netns":         "simnet",
	"github.com/spf13/cobra":               "cmd",
	"github.com/godbus/dbus":               "install",
}

type pkg struct {
	ImportPath                         string
	Imports, TestImports, XTestImports []string
}

func packages(t *testing.T) []pkg {
	t.Helper()
	cmd := exec.Command("go", "list", "-json=ImportPath,Imports,TestImports,XTestImports", "meshupd/...")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var all []pkg
	for dec := json.NewDecoder(out); ; {
		var p pkg
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	if len(all) < len(mayImport) {
		t.Fatalf("go list names only %d packages", len(all))
	}
	return all
}

// room of an import path of this module, "" for any other.
func room(path string) string {
	rest, ours := strings.CutPrefix(path, "meshupd/")
	if !ours {
		return ""
	}
	if strings.HasPrefix(rest, "simnet/fleet") {
		return "simnet/fleet"
	}
	first, _, _ := strings.Cut(rest, "/")
	return first
}

func TestArrowsRunOneWay(t *testing.T) {
	for _, p := range packages(t) {
		from := room(p.ImportPath)
		below, known := mayImport[from]
		if !known {
			t.Errorf("%s is in a room nobody planned", p.ImportPath)
			continue
		}
		for _, imp := range p.Imports {
			if to := room(imp); to != "" && to != from && !slices.Contains(below, to) {
				t.Errorf("%s imports %s: the arrow runs the other way", p.ImportPath, imp)
			}
		}
		// Tests may lean on a virtual LAN, which is a leaf, and on nothing else that production may not.
		for _, imp := range slices.Concat(p.TestImports, p.XTestImports) {
			if to := room(imp); to != "" && to != from && to != "simnet" && !slices.Contains(below, to) {
				t.Errorf("a test of %s imports %s: the arrow runs the other way", p.ImportPath, imp)
			}
		}
	}
}

func TestOneRoomKeepsEachLibrary(t *testing.T) {
	for _, p := range packages(t) {
		from, _, _ := strings.Cut(room(p.ImportPath), "/")
		for _, imp := range slices.Concat(p.Imports, p.TestImports, p.XTestImports) {
			for lib, home := range keeper {
				if (imp == lib || strings.HasPrefix(imp, lib+"/")) && from != home && !(home == "cmd" && from == "packaging") {
					t.Errorf("%s imports %s, which only %s may", p.ImportPath, imp, home)
				}
			}
		}
	}
}
