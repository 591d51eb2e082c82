// Keeps an index of the subjects of each relation, and prints each entry that changes.
//
//	go run . TENANT STATE_FILE [HOST:PORT]
//
// It stands for any program that follows a tenant: a cache, a search index, materialized permissions. The rules in the comments are
// those of ../README.md.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	basev1 "tuplewatch.example/watch/base/v1"
)

//go:generate protoc -I ../../proto --go_out=. --go-grpc_out=. --go_opt=paths=source_relative,Mbase/v1/base.proto=tuplewatch.example/watch/base/v1;basev1,Mbase/v1/watch.proto=tuplewatch.example/watch/base/v1;basev1,Mbase/v1/data.proto=tuplewatch.example/watch/base/v1;basev1 --go-grpc_opt=paths=source_relative,Mbase/v1/base.proto=tuplewatch.example/watch/base/v1;basev1,Mbase/v1/watch.proto=tuplewatch.example/watch/base/v1;basev1,Mbase/v1/data.proto=tuplewatch.example/watch/base/v1;basev1 base/v1/base.proto base/v1/watch.proto base/v1/data.proto

const waitMax = 10 * time.Second

// Index has the subjects by `document:1#viewer`, and the token of that state: saved together (rule 3).
type Index struct {
	Token    string                     `json:"token"`
	Subjects map[string]map[string]bool `json:"subjects"`
}

func load(path string) (*Index, error) {
	index := &Index{Subjects: map[string]map[string]bool{}}
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return index, nil
	} else if err != nil {
		return nil, err
	}
	return index, json.Unmarshal(text, index)
}

// save writes a second file and moves it over the first: a crash here leaves either the old or the new state. With a database, put
// the rows and the token into one transaction.
func (i *Index) save(path, token string) error {
	i.Token = token
	text, err := json.Marshal(i)
	if err != nil {
		return err
	}
	file, err := os.Create(path + ".new")
	if err != nil {
		return err
	}
	_, err = file.Write(text)
	if err = errors.Join(err, file.Sync(), file.Close()); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

func (i *Index) add(tuple *basev1.Tuple) (key, subject string) {
	key = fmt.Sprintf("%s:%s#%s", tuple.GetEntity().GetType(), tuple.GetEntity().GetId(), tuple.GetRelation())
	subject = fmt.Sprintf("%s:%s", tuple.GetSubject().GetType(), tuple.GetSubject().GetId())
	if relation := tuple.GetSubject().GetRelation(); relation != "" {
		subject += "#" + relation
	}
	if i.Subjects[key] == nil {
		i.Subjects[key] = map[string]bool{}
	}
	i.Subjects[key][subject] = true
	return key, subject
}

// apply adds or removes an entry, whether it exists or not: the stream may repeat a change that was already read (rule 2).
func (i *Index) apply(change *basev1.DataChange) {
	if change.GetTuple() == nil {
		return // Attributes come in the same way; this index has none.
	}
	key, subject := i.add(change.GetTuple())
	if change.GetOperation() == basev1.DataChange_OPERATION_DELETE {
		delete(i.Subjects[key], subject)
	}
	fmt.Println(key, "=", strings.Join(slices.Sorted(maps.Keys(i.Subjects[key])), " "))
}

type follower struct {
	conn         *grpc.ClientConn
	tenant, path string
	index        *Index
	token        string // The start of the next stream; empty: now.
	isComplete   bool   // Whether the index has everything up to the token.
	failures     int
}

// stream follows one stream, until it ends.
func (f *follower) stream(ctx context.Context) error {
	ctx, cancel := context.WithCancel(withCredentials(ctx))
	defer cancel() // The stream is still open if the read failed.
	request := &basev1.WatchRequest{TenantId: f.tenant, SnapToken: f.token}
	stream, err := basev1.NewWatchClient(f.conn).Watch(ctx, request)
	if err != nil {
		return err
	}
	// Returns when the start is fixed: every later commit is in the stream (rule 1).
	header, err := stream.Header()
	if err != nil {
		return err
	}
	// A refused stream has no such header, and its status follows when it is read.
	if start := header.Get("snap-token"); len(start) == 1 && !f.isComplete {
		if err := f.readState(ctx, start[0]); err != nil {
			return err
		}
		if err := f.index.save(f.path, start[0]); err != nil {
			return err
		}
		f.token, f.isComplete = start[0], true
	}
	for {
		response, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		f.failures = 0
		for _, change := range response.GetChanges().GetTupleChanges() {
			f.index.apply(change)
		}
		f.token = response.GetChanges().GetSnapToken()
		if err := f.index.save(f.path, f.token); err != nil {
			return err
		}
	}
}

// readState reads everything. Pages are from different moments; the stream has the changes between them (rule 2).
func (f *follower) readState(ctx context.Context, start string) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Minute)
	defer cancel()
	request := &basev1.RelationshipReadRequest{
		TenantId: f.tenant,
		Metadata: &basev1.RelationshipReadRequestMetadata{SnapToken: start},
		Filter:   &basev1.TupleFilter{},
		PageSize: 100,
	}
	f.index.Subjects = map[string]map[string]bool{}
	count := 0
	for {
		page, err := basev1.NewDataClient(f.conn).ReadRelationships(ctx, request)
		if err != nil {
			return err
		}
		for _, tuple := range page.GetTuples() {
			f.index.add(tuple)
			count++
		}
		if request.ContinuousToken = page.GetContinuousToken(); request.ContinuousToken == "" {
			fmt.Printf("read anew: %d tuples\n", count)
			return nil
		}
	}
}

func (f *follower) follow(ctx context.Context) error {
	for {
		if err := f.stream(ctx); err != nil {
			refusal, ok := status.FromError(err)
			if !ok {
				return err // Not from the server: for example, the file cannot be written.
			}
			log.Print(err)
			next := nextSnapToken(refusal)
			switch code := refusal.Code(); {
			case code == codes.Aborted && next != "":
				f.token, f.isComplete = next, false // Rule 4: changes are missing before this token.
			case slices.Contains(readAgain, code):
				f.token, f.isComplete = "", false // Rule 4: there is no token to continue from.
			case !slices.Contains(passing, code):
				return err
			}
		}
		// Rule 5. The wait is random, because other clients lost the same server.
		f.failures++
		wait := min(waitMax, 100*time.Millisecond<<min(f.failures, 10))
		time.Sleep(time.Duration((0.5 + rand.Float64()/2) * float64(wait)))
	}
}

// After these, the client starts without a token.
var readAgain = []codes.Code{codes.Aborted, codes.OutOfRange, codes.FailedPrecondition}

// Temporary errors. Every other status needs a person.
var passing = []codes.Code{codes.Unavailable, codes.ResourceExhausted, codes.DeadlineExceeded, codes.Internal, codes.Unknown,
	codes.Canceled}

func nextSnapToken(refusal *status.Status) string {
	for _, detail := range refusal.Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok {
			return info.GetMetadata()["next_snap_token"]
		}
	}
	return ""
}

func withCredentials(ctx context.Context) context.Context {
	if token := os.Getenv("TUPLEWATCH_TOKEN"); token != "" {
		return metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token)
	}
	return ctx
}

func main() {
	if len(os.Args) < 3 {
		log.Fatal("usage: watch TENANT STATE_FILE [HOST:PORT]")
	}
	address := "localhost:3478"
	if len(os.Args) > 3 {
		address = os.Args[3]
	}
	conn, err := grpc.NewClient(address,
		// Over TLS: credentials.NewTLS.
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		// A lost peer is silent. Without pings the client would wait for it for ever.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 20 * time.Second, Timeout: 10 * time.Second}),
		// How far the server may send ahead of us.
		grpc.WithInitialWindowSize(4<<20), grpc.WithInitialConnWindowSize(16<<20))
	if err != nil {
		log.Fatal(err)
	}
	index, err := load(os.Args[2])
	if err != nil {
		log.Fatal(err)
	}
	f := &follower{conn: conn, tenant: os.Args[1], path: os.Args[2], index: index, token: index.Token, isComplete: index.Token != ""}
	log.Fatal(f.follow(context.Background()))
}
