package main

import "meshupd/verify"

// codeText is what people read about a code. This is the one place for words
// about errors; the codes themselves are never translated.
type codeText struct {
	sentence string // what it means
	fix      string // what to do
	exit     int
	row      string // what to do, short, behind the detail in a status row; "" for nothing
}

// The exit codes. The same numbers are in help, man page and JSON.
const (
	exitOK          = 0
	exitFailed      = 1
	exitUsage       = 2
	exitNoDaemon    = 3
	exitNotAllowed  = 4
	exitNotFound    = 5
	exitRefused     = 6
	exitNoSpace     = 7
	exitTimeout     = 8
	exitInterrupted = 130
)

// codeFailed stands for errors that no room gave a code.
const codeFailed verify.Code = "E-FAILED"

// codeInterrupted stands for Ctrl-C.
const codeInterrupted verify.Code = "E-INTERRUPTED"

var codeTexts = map[verify.Code]codeText{
	verify.CodeSigNone: {
		"There is no signature at all.",
		"sign it with `meshupd release sign`, or ask the publisher for the signed release.", exitRefused, "",
	},
	verify.CodeSigKey: {
		"It is not signed by enough keys that this device trusts.",
		"compare the signer with `meshupd trust show`; a new key needs a new trust document from the publisher.", exitRefused, "",
	},
	verify.CodeSigBad: {
		"A trusted key's signature does not match the bytes: they were changed after they were signed.",
		"copy the release again from the publisher; if it stays so, do not use that source.", exitRefused, "",
	},
	verify.CodeSigProfile: {
		"A signature is of a kind that is not allowed (SHA-1 or MD5, text mode, RSA below 3072 bits ...).",
		"sign again with `meshupd release sign`, or with `gpg --detach-sign --digest-algo SHA512`.", exitRefused, "",
	},
	verify.CodeTrust: {
		"A trust document or certificate does not continue the chain that this device has.",
		"make the bundle again with the whole chain (`release create --trust DIR`), or check that it is your publisher's.", exitRefused, "",
	},
	verify.CodeFormat: {
		"A document cannot be read.",
		"copy the file again; if it stays so, it was made by another program or version.", exitRefused, "",
	},
	verify.CodeBundle: {
		"The bundle has extra, missing, renamed, duplicate or link entries.",
		"make it again with `meshupd release pack`; do not add or rename anything inside.", exitRefused, "",
	},
	verify.CodeTruncated: {
		"The bytes end too early.",
		"copy the file again and let the copy finish (unmount a stick before you pull it out).", exitRefused, "",
	},
	verify.CodeSize: {
		"Something is larger than allowed, or than was said.",
		"copy the file again; if it stays so, make the release again.", exitRefused, "",
	},
	verify.CodeDigest: {
		"The bytes are not those that were signed.",
		"copy the file again from the publisher; if it stays so, the stick or disk is failing.", exitRefused, "copied again by itself",
	},
	verify.CodeProduct: {
		"The release is for another product.",
		"use the release for the product that `meshupd status` shows.", exitRefused, "",
	},
	verify.CodeHardware: {
		"The release has no image for this hardware.",
		"use a release with an image for this hardware, or correct `hardware` in the config.", exitRefused, "needs another release",
	},
	verify.CodeKind: {
		"The release has images of a kind that this device has no slots for.",
		"make the release with the `--kind` that `slots.kind` of the device takes (container, or slot and files).", exitRefused, "needs another release",
	},
	verify.CodeChannel: {
		"The release is of another channel than this device follows.",
		"use a release of the device's channel, or set `channel` in the config.", exitRefused, "",
	},
	verify.CodeOrder: {
		"The release is older than one that was already accepted.",
		"use the newest release; an older version has to be published anew, marked as a downgrade.", exitRefused, "",
	},
	verify.CodeDowngrade: {
		"The version is lower than the one that runs, and the publisher did not say that this is meant.",
		"publish it with `release create --downgrade` if it is meant.", exitRefused, "",
	},
	verify.CodeRequires: {
		"The running version is not one that this release can be installed over.",
		"bring the release in between too: it is then installed first, by itself.", exitRefused, "needs a release in between",
	},
	verify.CodeExpired: {
		"The release or trust document is past its own date.",
		"use a newer release; signed dates decide, the device's clock is not asked, and the key is not at fault.", exitRefused, "",
	},
	verify.CodeCritical: {
		"The manifest has a critical field that this version does not know.",
		"update meshupd on this device with an older release first.", exitRefused, "",
	},
	verify.CodeRecalled: {
		"The publisher withdrew this release.",
		"use a newer release.", exitRefused, "needs another release",
	},
	verify.CodeDevKey: {
		"A development key signed a release of the channel stable, which is for real devices.",
		"sign with a key made without `--development`, or make the release with `--channel` of another name.", exitRefused, "",
	},
	verify.CodeMeshupd: {
		"The release needs a newer meshupd than runs on this device.",
		"install an older release that brings the newer meshupd first.", exitRefused, "needs a release in between",
	},
	verify.CodeFork: {
		"Two signed documents claim one place in the order.",
		"tell the publisher both digests: the keys were used twice for one place, by mistake or by a thief; the next document settles it.", exitRefused, "",
	},
	verify.CodeFailedHere: {
		"This image already failed on this device, so it is not tried again.",
		"look at `meshupd history` for the reason; a corrected release is tried.", exitRefused, "needs a corrected release",
	},
	verify.CodeHealth: {
		"The health check did not pass in time.",
		"look at `meshupd history DEVICE` and at the health command's own log.", exitFailed, "see meshupd history",
	},
	verify.CodeSlot: {
		"The slot cannot be written or read back.",
		"check the disk and the [slots] part of the config, then try again.", exitFailed, "check its disk",
	},
	verify.CodeInstaller: {
		"The installer of this device (RAUC, SWUpdate, Mender, a container engine or a program) refused the image.",
		"read its reason; the image needs that installer's own signature and compatible name; a container has to be an OCI archive for this processor. A corrected release is tried by itself.", exitFailed, "its installer refused the image",
	},
	verify.CodeBoot: {
		"The boot state cannot be read or changed.",
		"check the [slots] part of the config; the device stays on the version that runs.", exitFailed, "check its [slots] config",
	},
	verify.CodeRestart: {
		"The restart command failed.",
		"run the `[slots] restart` command of the config by hand and correct it.", exitFailed, "check its restart command",
	},
	verify.CodeHeld: {
		"The restart into the new version has to wait: the policy of the device or something on it holds it back.",
		"nothing is wrong; it goes on by itself when what it names is over.", exitFailed, "goes on by itself",
	},
	verify.CodeHook: {
		"A hook of this device refused, or could not be run.",
		"its reason is the last line that it printed to standard error; look at it in the folder `hooks.dir`. It is asked again by itself.", exitFailed, "asked again by itself",
	},
	verify.CodeSpace: {
		"There is not enough free space.",
		"free that much space, then do it again; nothing was begun.", exitNoSpace, "free space, it then goes on",
	},
	verify.CodeIO: {
		"The disk or stick failed.",
		"try another stick or port; look at the kernel log (`dmesg`).", exitFailed, "check its disk",
	},
	verify.CodeAdmission: {
		"A neighbour did not prove that it belongs to this site.",
		"give all devices of the site the same product trust and the same site key.", exitFailed, "check its site key",
	},
	verify.CodePeer: {
		"A neighbour sent bad data and is not listened to any more.",
		"the transfer goes on with others; check that neighbour's disk and memory.", exitFailed, "goes on with others",
	},
	verify.CodeTimeout: {
		"Time ran out.",
		"give it more time with --timeout, or look at what it waits for with `meshupd status`.", exitTimeout, "",
	},
	verify.CodeNotFound: {
		"There is no such device, release or file.",
		"check the name; `meshupd status --all` lists the devices.", exitNotFound, "",
	},
	verify.CodeDaemon: {
		"The daemon does not answer.",
		"start it with `systemctl start meshupd` (or `meshupd daemon`), or name its socket with --socket.", exitNoDaemon, "",
	},
	verify.CodeApply: {
		"The process that writes the slots does not answer.",
		"look at `systemctl status meshupd-apply.socket meshupd-apply` and at `apply.socket` in the config.", exitFailed, "check meshupd-apply, it then goes on",
	},
	verify.CodePermission: {
		"You are not allowed to do this.",
		"do it as root, or once: `sudo usermod -aG meshupd $USER`, then log in again.", exitNotAllowed, "",
	},
	verify.CodeConfig: {
		"The configuration cannot be used.",
		"correct that line, then check with `meshupd config check FILE`.", exitUsage, "",
	},
	verify.CodeUsage: {
		"The command line cannot be used.",
		"see `meshupd help` or the command's -h.", exitUsage, "",
	},
	verify.CodeKey: {
		"A key or passphrase cannot be used.",
		"check the key file (`meshupd key show FILE`) and the passphrase.", exitFailed, "",
	},
	verify.CodeBusy: {
		"Another operation has to end first.",
		"wait a moment and do it again.", exitFailed, "",
	},
	codeFailed: {
		"It failed for a reason of its own.",
		"look at the message; `-v` and the daemon's log may tell more.", exitFailed, "",
	},
	codeInterrupted: {
		"It was interrupted.",
		"do it again: nothing is half done.", exitInterrupted, "",
	},
}

// exitTexts explains the exit codes, for help and man page.
var exitTexts = []struct {
	exit int
	text string
}{
	{exitOK, "fine; also: nothing to do"},
	{exitFailed, "failed"},
	{exitUsage, "the command line or the config cannot be used"},
	{exitNoDaemon, "the daemon does not run"},
	{exitNotAllowed, "not allowed"},
	{exitNotFound, "no such device, release or file"},
	{exitRefused, "refused: signature, product, downgrade, damage; nothing was changed"},
	{exitNoSpace, "not enough space; nothing was begun"},
	{exitTimeout, "time ran out"},
	{exitInterrupted, "interrupted"},
}
