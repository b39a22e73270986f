package verify

import (
	"errors"
	"fmt"
)

// Code is the stable name of one reason to refuse, stop or wait. Codes appear in
// messages, in JSON and in `meshupd help CODE`; they are never renamed or translated.
type Code string

// The codes. The words for people and the exit numbers belong to cmd.
const (
	CodeSigNone    Code = "E-SIG-NONE"    // no signature at all
	CodeSigKey     Code = "E-SIG-KEY"     // no signature by enough keys that this device trusts
	CodeSigBad     Code = "E-SIG-BAD"     // a trusted key's signature does not match the bytes
	CodeSigProfile Code = "E-SIG-PROFILE" // a signature of a kind that the profile forbids (SHA-1, text mode, short RSA ...)
	CodeTrust      Code = "E-TRUST"       // a trust document or certificate that does not continue the chain
	CodeFormat     Code = "E-FORMAT"      // a document that cannot be read
	CodeBundle     Code = "E-BUNDLE"      // extra, missing, renamed, duplicate or link entries
	CodeTruncated  Code = "E-TRUNCATED"   // the bytes end too early
	CodeSize       Code = "E-SIZE"        // larger than allowed or than said
	CodeDigest     Code = "E-DIGEST"      // the bytes are not those that were signed
	CodeProduct    Code = "E-PRODUCT"     // for another product
	CodeHardware   Code = "E-HARDWARE"    // no image for this hardware
	CodeKind       Code = "E-KIND"        // images of a kind that this device has no slots for
	CodeChannel    Code = "E-CHANNEL"     // another channel than this device follows
	CodeOrder      Code = "E-ORDER"       // older than a release that was already accepted
	CodeDowngrade  Code = "E-DOWNGRADE"   // a lower version without the publisher's word for it
	CodeRequires   Code = "E-REQUIRES"    // the running version is not one this release can be installed over
	CodeExpired    Code = "E-EXPIRED"     // past its own date by proven time
	CodeCritical   Code = "E-CRITICAL"    // a critical field that this version does not know
	CodeRecalled   Code = "E-RECALLED"    // withdrawn by the publisher
	CodeDevKey     Code = "E-DEV-KEY"     // a development key signed what is for real devices
	CodeMeshupd    Code = "E-MESHUPD"     // needs a newer meshupd than runs here
	CodeFork       Code = "E-FORK"        // two signed documents claim one place in the order
	CodeFailedHere Code = "E-FAILED-HERE" // this image already failed on this device
	CodeHealth     Code = "E-HEALTH"      // the health check did not pass in time
	CodeSlot       Code = "E-SLOT"        // the slot cannot be written or read back
	CodeInstaller  Code = "E-INSTALLER"   // the installer or engine that slots.kind names refused the image
	CodeBoot       Code = "E-BOOT"        // the boot state cannot be read or changed
	CodeRestart    Code = "E-RESTART"     // the restart command failed
	CodeHeld       Code = "E-HELD"        // the restart into the new version has to wait
	CodeHook       Code = "E-HOOK"        // a hook of this device refused or failed
	CodeSpace      Code = "E-SPACE"       // not enough free space
	CodeIO         Code = "E-IO"          // the disk or stick failed
	CodeAdmission  Code = "E-ADMISSION"   // a neighbour did not prove membership
	CodePeer       Code = "E-PEER"        // a neighbour sent bad data
	CodeTimeout    Code = "E-TIMEOUT"     // time ran out
	CodeNotFound   Code = "E-NOT-FOUND"   // no such device, release or file
	CodeDaemon     Code = "E-DAEMON"      // the daemon does not answer
	CodeApply      Code = "E-APPLY"       // the process that writes the slots does not answer
	CodePermission Code = "E-PERMISSION"  // not allowed
	CodeConfig     Code = "E-CONFIG"      // the configuration cannot be used
	CodeUsage      Code = "E-USAGE"       // the command line cannot be used
	CodeKey        Code = "E-KEY"         // a key or passphrase cannot be used
	CodeBusy       Code = "E-BUSY"        // another operation has to end first
)

// Refusal is an error with a Code. Detail says what was found, in one clause,
// without advice; the fix is looked up by Code where it is shown.
type Refusal struct {
	Code   Code
	Detail string
	// NeedBytes is set with CodeSpace: how many more bytes must be free.
	NeedBytes int64
	err       error
}

func (r *Refusal) Error() string { return r.Detail }

// Unwrap returns the error below, if there is one.
func (r *Refusal) Unwrap() error { return r.err }

// Refuse makes a coded error. A %w verb keeps the error below reachable.
func Refuse(code Code, format string, args ...any) error {
	err := fmt.Errorf(format, args...)
	return &Refusal{Code: code, Detail: err.Error(), err: errors.Unwrap(err)}
}

// CodeOf returns the code of the outermost Refusal in err's chain, or "".
func CodeOf(err error) Code {
	var r *Refusal
	if errors.As(err, &r) {
		return r.Code
	}
	return ""
}
