package history

import (
	"math"
	"math/bits"
	"time"
)

// Buckets of a latency: four to each power of two of microseconds, from 1 us up; what takes longer than 16 s is in the last one.
const (
	perOctave = 4
	octaves   = 24
	Buckets   = perOctave * octaves
)

// Bucket is where a duration is counted.
func Bucket(d time.Duration) int {
	us := uint64(max(d.Microseconds(), 1))
	octave := bits.Len64(us) - 1
	if octave >= octaves {
		return Buckets - 1
	}
	rest := 0
	if octave >= 2 {
		rest = int(us>>(octave-2)) & (perOctave - 1)
	} else {
		rest = int(us<<(2-octave)) & (perOctave - 1)
	}
	return octave*perOctave + rest
}

// Latency counts requests by how long they took.
type Latency [Buckets]uint32

func (l *Latency) add(other *Latency) {
	for i, n := range other {
		if n > math.MaxUint32-l[i] {
			l[i] = math.MaxUint32
			continue
		}
		l[i] += n
	}
}

func (l *Latency) count() (n uint64) {
	for _, c := range l {
		n += uint64(c)
	}
	return n
}

// Quantile is the time in seconds that a share q of the requests did not exceed, to an eighth; NaN where there were none.
func (l *Latency) Quantile(q float64) float64 {
	all := l.count()
	if all == 0 {
		return math.NaN()
	}
	want, seen := uint64(math.Ceil(q*float64(all))), uint64(0)
	for i, c := range l {
		if seen += uint64(c); seen >= want && c > 0 {
			return middle(i)
		}
	}
	return middle(Buckets - 1)
}

// Cumulative gives the counts by upper bounds in seconds, of a quarter of the buckets, and count and sum of all, as Prometheus has them.
func (l *Latency) Cumulative() (count uint64, sum float64, by map[float64]uint64) {
	by = make(map[float64]uint64, octaves)
	for i, n := range l {
		count += uint64(n)
		sum += float64(n) * middle(i)
		if i%perOctave == perOctave-1 {
			by[math.Ldexp(1, i/perOctave+1)*1e-6] = count
		}
	}
	return count, sum, by
}

// middle of a bucket, in seconds.
func middle(i int) float64 {
	octave, rest := i/perOctave, i%perOctave
	return math.Ldexp(1+(float64(rest)+0.5)/perOctave, octave) * 1e-6
}
