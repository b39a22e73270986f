// Package packaging holds what goes around the binary: units, rules, the Debian package and its tools.
package packaging

import (
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"testing"
)

// need skips without the tool on a developer's machine, and fails where everything has to run.
func need(t *testing.T, tool, debian string) {
	t.Helper()
	if _, err := exec.LookPath(tool); err == nil {
		return
	}
	if os.Getenv("CI") != "" {
		t.Fatalf("%s is missing: apt-get install %s", tool, debian)
	}
	t.Skipf("%s is missing: apt-get install %s", tool, debian)
}

var exposure = regexp.MustCompile(`Overall exposure level for \S+: ([0-9.]+) `)

// What faces the network or a stick stays shut; the half that writes slots does not get looser unseen.
func TestExposure(t *testing.T) {
	need(t, "systemd-analyze", "systemd")
	for unit, most := range map[string]float64{"meshupd.service": 2.0, "meshupd-import@.service": 2.0, "meshupd-apply.service": 4.5} {
		out, err := exec.Command("systemd-analyze", "security", "--offline=true", "--no-pager", "systemd/"+unit).CombinedOutput()
		m := exposure.FindSubmatch(out)
		if m == nil {
			t.Fatalf("%s: no score (%v): %s", unit, err, out)
		}
		score, err := strconv.ParseFloat(string(m[1]), 64)
		if err != nil || score > most {
			t.Errorf("%s scores %s, more than %.1f", unit, m[1], most)
		}
		t.Logf("%s scores %s", unit, m[1])
	}
}
