package bootlab

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strings"
)

// Entry is one request in a recorded write log.
type Entry struct {
	At    int64
	Data  []byte
	Flush bool // what was completed before is durable
	FUA   bool // the write itself is durable when it is completed
}

const (
	logMagic     = 0x6a736677736872 // Documentation/admin-guide/device-mapper/log-writes.rst; qemu's blklogwrites writes the same
	maxLogFile   = 1 << 30
	maxLogSector = 4096
	logFlush     = 1
	logFUA       = 2
	logDiscard   = 4
)

// ReadLog reads what qemu recorded of a disk of that many bytes. A discard is an entry without data: what it leaves is the disk's affair.
func ReadLog(path string, disk int64) ([]Entry, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if info.Size() > maxLogFile {
		return nil, fmt.Errorf("the write log has %d bytes", info.Size())
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	return parseLog(data, disk)
}

func parseLog(data []byte, disk int64) ([]Entry, error) {
	short := errors.New("the write log ends early")
	if len(data) < 28 || binary.LittleEndian.Uint64(data) != logMagic {
		return nil, errors.New("this is no write log")
	}
	count, sector := binary.LittleEndian.Uint64(data[16:]), uint64(binary.LittleEndian.Uint32(data[24:]))
	if sector < 512 || sector > maxLogSector {
		return nil, fmt.Errorf("the write log has sectors of %d bytes", sector)
	}
	var log []Entry
	at, size := sector, uint64(len(data))
	for range count {
		if at > size || size-at < 32 {
			return nil, short
		}
		first, n := binary.LittleEndian.Uint64(data[at:]), binary.LittleEndian.Uint64(data[at+8:])
		flags := binary.LittleEndian.Uint64(data[at+16:])
		at += sector
		if first > uint64(disk)/sector || n > uint64(disk)/sector-first {
			return nil, errors.New("the write log goes past the end of the disk")
		}
		e := Entry{At: int64(first * sector), Flush: flags&logFlush != 0, FUA: flags&logFUA != 0}
		if flags&logDiscard == 0 {
			if at > size || size-at < n*sector {
				return nil, short
			}
			e.Data = data[at : at+n*sector]
			at += n * sector
		}
		log = append(log, e)
	}
	return log, nil
}

// markOf says which marker a write is.
func markOf(e Entry) Marker {
	if e.At != layout[PartMarks].at || len(e.Data) < len(MarkerPrefix) {
		return ""
	}
	line, _, _ := strings.Cut(string(e.Data), "\n")
	name, found := strings.CutPrefix(line, MarkerPrefix)
	if !found {
		return ""
	}
	return Marker(name)
}
