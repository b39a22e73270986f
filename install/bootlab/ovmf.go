package bootlab

import "os"

const (
	ovmfCode = "/usr/share/OVMF/OVMF_CODE_4M.fd" // Debian's ovmf
	ovmfVars = "/usr/share/OVMF/OVMF_VARS_4M.fd"
)

// EFIFiles are the files of the packages ovmf and systemd-boot-efi that the kinds with UEFI firmware need.
var EFIFiles = []string{ovmfCode, ovmfVars, systemdBootEFI}

// newVars makes the variables of a new machine beside its disk.
func newVars(kind Kind, disk string) (path string, err error) {
	vars, err := os.ReadFile(ovmfVars)
	if err != nil {
		return "", err
	}
	if kind.Vars != nil {
		if vars, err = kind.Vars(vars); err != nil {
			return "", err
		}
	}
	path = disk + ".vars"
	return path, os.WriteFile(path, vars, 0o600)
}
