package doctor

import (
	"regexp"
	"strings"
)

// codeOf is a script without comments.
func codeOf(script []byte) string {
	var b strings.Builder
	for line := range strings.Lines(string(script)) {
		if trimmed := strings.TrimSpace(line); !strings.HasPrefix(trimmed, "#") {
			b.WriteString(line)
		}
	}
	return b.String()
}

// want is something that a boot script has to have, and what is missed without it.
type want struct {
	pattern *regexp.Regexp
	missing string
}

func missing(script []byte, wants []want) (out []string) {
	code := codeOf(script)
	for _, w := range wants {
		if !w.pattern.MatchString(code) {
			out = append(out, w.missing)
		}
	}
	return out
}

// GRUBLacks lists what a grub.cfg lacks to choose between slots by the variables of RAUC's layout. It does not understand the
// script; it finds one that was never made for two slots.
func GRUBLacks(cfg []byte, a, b string) []string {
	return missing(cfg, []want{
		{regexp.MustCompile(`\bload_env\b`), "load_env (the environment is never read)"},
		{regexp.MustCompile(`\$\{?ORDER\b`), "$ORDER (the order of the slots is not looked at)"},
		{regexp.MustCompile(`\$\{?` + regexp.QuoteMeta(a) + `_OK\b|_OK\b`), a + "_OK, " + b + "_OK (a slot with half an image would be booted)"},
		{regexp.MustCompile(`_TRY=1|_TRY 1|_TRY=\$`), a + "_TRY=1 (a trial is not marked, so it never falls back)"},
		{regexp.MustCompile(`\bsave_env\b`), "save_env (a trial is not marked, so it never falls back)"},
	})
}

// UBootLacks lists what a boot script or environment of U-Boot lacks. Scheme is that of install.UBoot: "left" or "count".
func UBootLacks(script []byte, scheme, variable string) []string {
	if scheme == "count" {
		return missing(script, []want{
			{regexp.MustCompile(`\b` + regexp.QuoteMeta(variable) + `\b`), variable + " (the slot to boot is not looked at)"},
			{regexp.MustCompile(`\baltbootcmd\b`), "altbootcmd (a trial that does not come up is never given up)"},
		})
	}
	return missing(script, []want{
		{regexp.MustCompile(`\bBOOT_ORDER\b`), "BOOT_ORDER (the order of the slots is not looked at)"},
		{regexp.MustCompile(`\bBOOT_\S*_LEFT\b`), "BOOT_x_LEFT (starts are not counted, so a trial never falls back)"},
		{regexp.MustCompile(`\b(saveenv|env\s+save)\b`), "saveenv (starts are not counted, so a trial never falls back)"},
	})
}

// NamesSlot says whether a boot script tells the kernel which slot it starts.
func NamesSlot(script []byte) bool {
	code := codeOf(script)
	return strings.Contains(code, "meshupd.slot=") || strings.Contains(code, "rauc.slot=")
}
