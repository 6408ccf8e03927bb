package metrics

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

const (
	// Path is where the metrics are.
	Path = "/metrics"
	// patience is how long one who asks may take for anything.
	patience = 10 * time.Second
)

// Server is an address that is listened at.
type Server struct {
	listener net.Listener
	metrics  *Metrics
}

// Listen listens at an address of the form HOST:PORT. Without a host it is that of the
// machine itself, which others cannot reach.
func Listen(address string, m *Metrics) (*Server, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, fmt.Errorf("metrics address %q: write HOST:PORT, or :PORT for this machine alone: %w", address, err)
	}
	if host == "" {
		host = "127.0.0.1"
	}
	listener, err := net.Listen("tcp", net.JoinHostPort(host, port))
	if err != nil {
		return nil, fmt.Errorf("metrics address %q: %w", address, err)
	}
	return &Server{listener: listener, metrics: m}, nil
}

// Addr is the address.
func (s *Server) Addr() net.Addr { return s.listener.Addr() }

// Loopback reports whether only the machine itself reaches the address.
func (s *Server) Loopback() bool {
	addr, ok := s.listener.Addr().(*net.TCPAddr)
	return ok && addr.IP.IsLoopback()
}

// Close ends listening, for a server that is not to serve.
func (s *Server) Close() error { return s.listener.Close() }

// Serve answers until ctx ends, then returns nil.
func (s *Server) Serve(ctx context.Context) error {
	registry := prometheus.NewRegistry()
	for _, c := range []prometheus.Collector{
		s.metrics, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
	} {
		if err := registry.Register(c); err != nil {
			return errors.Join(fmt.Errorf("metrics: %w", err), s.listener.Close())
		}
	}
	mux := http.NewServeMux()
	mux.Handle("GET "+Path, promhttp.HandlerFor(registry, promhttp.HandlerOpts{
		// Each asks the kernel for counters of all partitions.
		MaxRequestsInFlight: 2,
		Timeout:             patience,
	}))
	server := &http.Server{
		Handler: mux, ReadTimeout: patience, WriteTimeout: 2 * patience, IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10,
	}
	closed := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(closed)
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		if server.Shutdown(ctx) != nil {
			server.Close()
		}
	})
	err := server.Serve(s.listener)
	if !stop() {
		<-closed
	}
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return fmt.Errorf("metrics: %w", err)
}
