package peer

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"net"
	"slices"
	"time"

	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/libp2p/go-libp2p/core/sec"
	libp2ptls "github.com/libp2p/go-libp2p/p2p/security/tls"
)

// clocklessTLS is libp2p's TLS 1.3 (spec: tls/1.0.0) with a certificate that
// is valid at any time.
//
// libp2p's own constructor makes the certificate valid from an hour ago, and
// checks it against the clock. A device without a battery believes it is 1970
// and would refuse every neighbour whose clock is right. The dates carry no
// security: the certificate is made anew at each start and is bound to the
// identity key by a signature, and that is what is checked.
type clocklessTLS struct {
	identity *libp2ptls.Identity
	self     peer.ID
	muxers   []protocol.ID
}

var _ sec.SecureTransport = (*clocklessTLS)(nil)

func newClocklessTLS(key crypto.PrivKey, muxers []protocol.ID) (*clocklessTLS, error) {
	self, err := peer.IDFromPrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("derive the peer id: %w", err)
	}
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		return nil, fmt.Errorf("make a certificate: %w", err)
	}
	identity, err := libp2ptls.NewIdentity(key, libp2ptls.WithCertTemplate(&x509.Certificate{
		SerialNumber: serial,
		NotBefore:    time.Date(1950, 1, 1, 0, 0, 0, 0, time.UTC),
		NotAfter:     time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC), // "no well-defined expiry", RFC 5280 section 4.1.2.5
		Subject:      pkix.Name{SerialNumber: serial.String()},
	}))
	if err != nil {
		return nil, fmt.Errorf("make a certificate: %w", err)
	}
	return &clocklessTLS{identity: identity, self: self, muxers: muxers}, nil
}

func (t *clocklessTLS) ID() protocol.ID { return libp2ptls.ID }

// SecureInbound runs the handshake as server and lets the client's preference pick the muxer.
func (t *clocklessTLS) SecureInbound(ctx context.Context, plain net.Conn, p peer.ID) (sec.SecureConn, error) {
	config, key := t.config(p)
	config.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		for _, proto := range hello.SupportedProtos {
			if slices.Contains(t.muxers, protocol.ID(proto)) {
				config.NextProtos = []string{proto}
				break
			}
		}
		return config, nil
	}
	return t.handshake(ctx, tls.Server(plain, config), key)
}

// SecureOutbound runs the handshake as client. An empty p accepts, and learns, any identity.
func (t *clocklessTLS) SecureOutbound(ctx context.Context, plain net.Conn, p peer.ID) (sec.SecureConn, error) {
	config, key := t.config(p)
	return t.handshake(ctx, tls.Client(plain, config), key)
}

func (t *clocklessTLS) config(p peer.ID) (*tls.Config, <-chan crypto.PubKey) {
	config, key := t.identity.ConfigForPeer(p)
	protos := make([]string, 0, len(t.muxers)+len(config.NextProtos))
	for _, m := range t.muxers {
		protos = append(protos, string(m))
	}
	config.NextProtos = append(protos, config.NextProtos...)
	return config, key
}

func (t *clocklessTLS) handshake(ctx context.Context, conn *tls.Conn, key <-chan crypto.PubKey) (sec.SecureConn, error) {
	if err := conn.HandshakeContext(ctx); err != nil {
		conn.Close()
		return nil, fmt.Errorf("secure a connection: %w", err)
	}
	var remote crypto.PubKey
	select {
	case remote = <-key:
	default:
	}
	if remote == nil {
		conn.Close()
		return nil, errors.New("secure a connection: the other side showed no key")
	}
	id, err := peer.IDFromPublicKey(remote)
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("secure a connection: %w", err)
	}
	state := network.ConnectionState{}
	if muxer := protocol.ID(conn.ConnectionState().NegotiatedProtocol); slices.Contains(t.muxers, muxer) {
		state.StreamMultiplexer = muxer
		state.UsedEarlyMuxerNegotiation = true
	}
	return &securedConn{Conn: conn, self: t.self, remote: id, key: remote, state: state}, nil
}

// securedConn is a TLS connection whose other end has proven its identity.
type securedConn struct {
	*tls.Conn
	self, remote peer.ID
	key          crypto.PubKey
	state        network.ConnectionState
}

func (c *securedConn) LocalPeer() peer.ID                 { return c.self }
func (c *securedConn) RemotePeer() peer.ID                { return c.remote }
func (c *securedConn) RemotePublicKey() crypto.PubKey     { return c.key }
func (c *securedConn) ConnState() network.ConnectionState { return c.state }
