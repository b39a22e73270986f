package publish

import (
	"os"
	"strconv"
	"time"

	"meshupd/verify"
)

// Now is the time that goes into documents: SOURCE_DATE_EPOCH (seconds since
// 1970, reproducible-builds.org) when it is set, else the clock; whole seconds, UTC.
// It refuses with E-USAGE when the variable is not a number.
func Now() (time.Time, error) {
	value, ok := os.LookupEnv("SOURCE_DATE_EPOCH")
	if !ok || value == "" {
		return time.Now().UTC().Truncate(time.Second), nil
	}
	seconds, err := strconv.ParseInt(value, 10, 64)
	if err != nil || seconds < 1 {
		return time.Time{}, verify.Refuse(verify.CodeUsage, "SOURCE_DATE_EPOCH is %q, not a number of seconds", value)
	}
	return time.Unix(seconds, 0).UTC(), nil
}
