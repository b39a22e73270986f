package bootlab

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode/utf16"
)

// fat reads FAT16 and FAT32 as firmware does: from the bytes of the medium, without repairing anything.
type fat struct {
	image  []byte
	unit   int    // bytes of a cluster
	table  int    // where the first allocation table begins
	wide   bool   // FAT32
	root   []byte // of FAT16
	first  uint32 // cluster of the root of FAT32
	data   int    // where cluster 2 begins
	number uint32 // clusters
}

var errFAT = errors.New("this is no FAT file system")

func openFAT(image []byte) (fat, error) {
	if len(image) < 512 || image[510] != 0x55 || image[511] != 0xaa {
		return fat{}, errFAT
	}
	word := func(at int) int { return int(binary.LittleEndian.Uint16(image[at:])) }
	long := func(at int) int { return int(binary.LittleEndian.Uint32(image[at:])) }
	sector, f := word(11), fat{image: image}
	f.unit, f.table = sector*int(image[13]), sector*word(14)
	perTable := word(22)
	if f.wide = perTable == 0; f.wide {
		perTable, f.first = long(36), uint32(long(44))
	}
	rootAt := f.table + int(image[16])*perTable*sector
	f.data = rootAt + word(17)*32
	if sector < 512 || f.unit == 0 || rootAt < 0 || f.data < rootAt || f.data > len(image) {
		return fat{}, errFAT
	}
	f.root, f.number = image[rootAt:f.data], uint32((len(image)-f.data)/f.unit)
	return f, nil
}

// chain reads the clusters of a file. An error says that the chain does not hold.
func (f fat) chain(first uint32) (data []byte, clusters []uint32, err error) {
	for c := first; ; {
		if c < 2 || c >= f.number+2 || len(clusters) > int(f.number) {
			return nil, nil, fmt.Errorf("cluster %d of a chain is none", c)
		}
		at := f.data + int(c-2)*f.unit
		data, clusters = append(data, f.image[at:at+f.unit]...), append(clusters, c)
		end := uint32(0xfff8)
		if f.wide {
			c, end = binary.LittleEndian.Uint32(f.image[f.table+4*int(c):])&0x0fffffff, 0x0ffffff8
		} else {
			c = uint32(binary.LittleEndian.Uint16(f.image[f.table+2*int(c):]))
		}
		if c >= end {
			return data, clusters, nil
		}
	}
}

// fatEntry is one name in a folder.
type fatEntry struct {
	name   string
	folder bool
	first  uint32
	size   int
}

// list reads a folder. Long names whose checksum does not fit the short one are ignored, as firmware does.
func list(dir []byte) (all []fatEntry) {
	var long []uint16
	sum, left := byte(0), byte(0)
	for ; len(dir) >= 32 && dir[0] != 0; dir = dir[32:] {
		e := dir[:32]
		switch {
		case e[0] == 0xe5:
			left = 0
		case e[11]&0x3f == 0x0f:
			if e[0]&0x40 != 0 {
				long, sum, left = nil, e[13], e[0]&0x3f+1
			}
			if left == 0 || e[0]&0x3f != left-1 || e[13] != sum {
				left = 0
				continue
			}
			left--
			long = append(lfnPart(e), long...)
			if left == 1 {
				left = 0xff // all parts are there
			}
		case e[11]&0x08 != 0:
			left = 0
		default:
			name := shortName(e)
			if left == 0xff && sum == shortSum(e) {
				name = string(utf16.Decode(long))
			}
			left = 0
			all = append(all, fatEntry{name: name, folder: e[11]&0x10 != 0, size: int(binary.LittleEndian.Uint32(e[28:])),
				first: uint32(binary.LittleEndian.Uint16(e[20:]))<<16 | uint32(binary.LittleEndian.Uint16(e[26:]))})
		}
	}
	return all
}

func lfnPart(e []byte) (part []uint16) {
	for _, r := range [][2]int{{1, 11}, {14, 26}, {28, 32}} {
		for at := r[0]; at < r[1]; at += 2 {
			c := binary.LittleEndian.Uint16(e[at:])
			if c == 0 {
				return part
			}
			part = append(part, c)
		}
	}
	return part
}

func shortName(e []byte) string {
	base, ext := strings.TrimRight(string(e[:8]), " "), strings.TrimRight(string(e[8:11]), " ")
	if e[12]&0x08 != 0 {
		base = strings.ToLower(base)
	}
	if e[12]&0x10 != 0 {
		ext = strings.ToLower(ext)
	}
	if ext == "" {
		return base
	}
	return base + "." + ext
}

func shortSum(e []byte) (sum byte) {
	for _, c := range e[:11] {
		sum = sum>>1 | sum<<7
		sum += c
	}
	return sum
}

// fatFolder reads all files of a folder whose chains hold. An error says that the folder cannot be read, or that two of its
// files own the same cluster: when one of them is removed the other is lost.
func fatFolder(image []byte, path ...string) (map[string][]byte, error) {
	f, err := openFAT(image)
	if err != nil {
		return nil, err
	}
	dir := f.root
	if f.wide {
		if dir, _, err = f.chain(f.first); err != nil {
			return nil, err
		}
	}
	for _, name := range path {
		all := list(dir)
		at := slices.IndexFunc(all, func(e fatEntry) bool { return e.folder && strings.EqualFold(e.name, name) })
		if at < 0 {
			return nil, fmt.Errorf("there is no folder %s", name)
		}
		if dir, _, err = f.chain(all[at].first); err != nil {
			return nil, err
		}
	}
	return f.files(dir)
}

func (f fat) files(dir []byte) (map[string][]byte, error) {
	files, owner := make(map[string][]byte), make(map[uint32]string)
	for _, e := range list(dir) {
		if e.folder {
			continue
		}
		if e.size == 0 {
			files[e.name] = nil
			continue
		}
		data, clusters, err := f.chain(e.first)
		if err != nil || len(data) < e.size {
			continue
		}
		for _, c := range clusters {
			if other := owner[c]; other != "" {
				return nil, fmt.Errorf("%w: %s and %s", errCrossed, other, e.name)
			}
			owner[c] = e.name
		}
		files[e.name] = data[:e.size]
	}
	return files, nil
}

var errCrossed = errors.New("two files own the same cluster")
