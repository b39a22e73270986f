package swarm

import (
	"context"
	"errors"
	"io"

	g "github.com/anacrolix/generics"
	"github.com/anacrolix/torrent/metainfo"
	"github.com/anacrolix/torrent/storage"

	"meshupd/verify"
)

// storageOf gives the engine a transfer's bytes: plain reads and writes at an
// offset of one file. It is not memory-mapped: a file that is cut short under a
// map ends the process.
type storageOf struct{ t *transfer }

// OpenTorrent implements storage.ClientImpl.
func (s storageOf) OpenTorrent(context.Context, *metainfo.Info, metainfo.Hash) (storage.TorrentImpl, error) {
	piece := func(p metainfo.Piece) storage.PieceImpl { return pieceOf{s.t, p.Index()} }
	return storage.TorrentImpl{
		Piece:         piece,
		PieceWithHash: func(p metainfo.Piece, _ g.Option[[]byte]) storage.PieceImpl { return piece(p) },
	}, nil
}

// noStorage is for torrents that bring none; there are none.
type noStorage struct{}

func (noStorage) OpenTorrent(context.Context, *metainfo.Info, metainfo.Hash) (storage.TorrentImpl, error) {
	return storage.TorrentImpl{}, errors.New("swarm: a torrent without storage")
}

// pieceOf is one piece of it.
type pieceOf struct {
	t *transfer
	i int
}

func (p pieceOf) offset() int64 { return int64(p.i) * p.t.g.length }

// ReadAt fails the transfer when the bytes are not held any more: nobody would notice otherwise.
func (p pieceOf) ReadAt(b []byte, off int64) (int, error) {
	n, err := p.t.bytes.readAt(b, p.offset()+off)
	if code := verify.CodeOf(err); code == verify.CodeSlot || code == verify.CodeNotFound {
		p.t.fail(err)
	}
	return n, err
}

func (p pieceOf) WriteAt(b []byte, off int64) (int, error) { return p.t.bytes.write(b, p.offset()+off) }

// WriteTo is how the engine reads a piece back to hash it.
func (p pieceOf) WriteTo(w io.Writer) (int64, error) { return p.t.bytes.writePiece(w, p.i) }

// MarkComplete is called after the piece's SHA-256 (BEP 52) was found right on
// what is on disk. An error would not stop the engine from counting the piece, so
// there is none.
func (p pieceOf) MarkComplete() error {
	p.t.pieceGood(p.i)
	return nil
}

// MarkNotComplete is called after the hash was found wrong.
func (p pieceOf) MarkNotComplete() error {
	p.t.pieceBad(p.i)
	return nil
}

func (p pieceOf) Completion() storage.Completion {
	return storage.Completion{Ok: true, Complete: p.t.bytes.hasPiece(p.i)}
}
