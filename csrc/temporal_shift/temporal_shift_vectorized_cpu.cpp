// Temporal shift, C++, vectorized: runs of bytes, each from one frame to one frame.
//
// Formula: temporal_shift.h. A row has up to three runs; one step copies a run. A small output is gathered: a
//   tile of it, run by run, from three frames. A large one is scattered: a tile of the input, read in order,
//   to three frames, and past the caches. Such stores need no line in a cache, so that their order costs
//   nothing; loads out of order wait for memory. Where runs meet within a vector of the output, it is always
//   gathered.
//   In place a tile of the folds is walked through all frames of a clip, so that what has been read is in the
//   first cache when it is overwritten.
// Bytes: each value is read once and written once, but those that leave their clip, which are not moved; in
//   place those of the folds. A seam's cache line is read for each frame that it holds.
// Before it: plain moves one value at a time, and asks of each where it comes from.
// Limits: in channels_last, rows that are not whole vectors are copied by halves and quarters.
#include <algorithm>

#include "../common/copy.h"
#include "../common/tile.h"
#include "temporal_shift.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {
namespace {

constexpr int V = vector_bytes;
constexpr int64_t tile_bytes = 64 << 10, group_bytes = 2 << 10;
constexpr int64_t column_bytes = 8 << 10;  // of each frame, in place
// Outputs up to here stay in the last cache, together with their input: more than stores_past_caches asks
// for, since nothing is computed meanwhile.
constexpr int64_t most_cached_bytes = 16 << 20;

// Bytes [begin, end) of each row go from one frame to another.
struct Run {
  int64_t begin, end;
  const char* from;  // none: zeros
  char* to;
};

// A vector of each row in which runs meet: from up to three frames, a mask for each.
struct Seam {
  int64_t begin;
  const char* from[3];  // none: nothing
  Bytes<V> mask[3];
  char* to;
};

struct Moves {
  Run runs[5];
  Seam seams[2];
  int run_count = 0, seam_count = 0;
  bool whole_vectors;  // of which the runs are, in every row

  void add_run(int64_t begin, int64_t end, const char* from, char* to) {
    if (begin < end) runs[run_count++] = {begin, end, from, to};
  }
};

// Rows [first, last) of a tile: each move through a few rows, so that their lines stay in the first cache;
// what is streamed, row by row, in the order of memory.
template <bool streams>
void move_rows(const Moves& moves, int64_t length, int64_t first, int64_t last) {
  const int64_t group = streams ? 1 : std::max<int64_t>(1, group_bytes / length);
  for (int64_t row = first; row < last; row += group) {
    const int64_t start = row * length, end = std::min(row + group, last) * length;
    for (int i = 0; i < moves.run_count; ++i) {
      const Run run = moves.runs[i];
      const int64_t bytes = run.end - run.begin;
      const bool by_vectors = !streams && moves.whole_vectors && run.from != nullptr;
      for (int64_t at = start + run.begin; at < end; at += length) {
        if (by_vectors) {
          for (int64_t k = 0; k < bytes; k += V) copy_bytes<V>(run.to + at + k, run.from + at + k);
        } else {
          (streams ? stream_run : move_run)(run.to + at, run.from == nullptr ? nullptr : run.from + at,
                                            bytes);
        }
      }
    }
    for (int i = 0; i < moves.seam_count; ++i) {
      const Seam seam = moves.seams[i];
      for (int64_t at = start + seam.begin; at < end; at += length) {
        Bytes<V> sum{};
        for (int k = 0; k < 3; ++k) {
          if (seam.from[k] == nullptr) continue;
          Bytes<V> value;
          __builtin_memcpy(&value, seam.from[k] + at, V);
          sum |= value & seam.mask[k];
        }
        if (streams) {
          stream_vector(reinterpret_cast<float*>(seam.to + at), (Vector<float>)sum);
        } else {
          __builtin_memcpy(seam.to + at, &sum, V);
        }
      }
    }
  }
}

// Where the runs of a row begin and end.
struct Row {
  int64_t bounds[4];
  bool whole_vectors;  // so that runs are cut at vectors, and seams are what is left
  int64_t seams[2];    // where they begin
  int seam_count = 0;

  explicit Row(const TemporalShiftShape& s)
      : bounds{0, s.fold, s.both ? 2 * s.fold : s.fold, s.length},
        whole_vectors(s.rows > 1 && s.length % V == 0 && s.length <= tile_bytes) {
    for (int i = 1; i < 3 && whole_vectors; ++i) {
      const int64_t begin = bounds[i] / V * V;
      if (begin < bounds[i] && (seam_count == 0 || seams[0] < begin)) seams[seam_count++] = begin;
    }
  }
  int64_t begin(int run) const { return whole_vectors ? (bounds[run] + V - 1) / V * V : bounds[run]; }
  int64_t end(int run) const { return whole_vectors ? bounds[run + 1] / V * V : bounds[run + 1]; }
  bool meets(int seam, int run) const {
    return bounds[run] < seams[seam] + V && bounds[run + 1] > std::max(bounds[run], seams[seam]);
  }
  Bytes<V> mask(int seam, int run) const {
    Bytes<V> result;
    for (int i = 0; i < V; ++i) {
      const int64_t place = seams[seam] + i;
      result[i] = place >= bounds[run] && place < bounds[run + 1] ? 0xff : 0;
    }
    return result;
  }
};

// s: in bytes instead of values.
void shift_bytes(const char* input, char* output, const TemporalShiftShape& s, ParallelFor threads) {
  const Row row(s);
  Bytes<V> masks[2][3];
  for (int seam = 0; seam < row.seam_count; ++seam)
    for (int run = 0; run < 3; ++run) masks[seam][run] = row.mask(seam, run);
  const int64_t size = s.frame_size();
  const bool scatters =
      (row.whole_vectors || s.rows == 1) && stores_past_caches(output, s.frames * size, most_cached_bytes);
  // A tile is a few rows, or a part of one.
  const int64_t rows = std::max<int64_t>(1, tile_bytes / s.length), part = std::min(tile_bytes, s.length);
  const int64_t tall = (s.rows + rows - 1) / rows, wide = (s.length + part - 1) / part;
  const int64_t steps[3] = {s.step, -s.step, 0};
  parallel_for(threads, s.frames * tall * wide, [&](int64_t first_tile, int64_t last_tile) {
    for (int64_t tile = first_tile; tile < last_tile; ++tile) {
      const int64_t frame = tile / (tall * wide), first = tile / wide % tall * rows;
      const int64_t left = tile % wide * part, right = std::min(left + part, s.length);
      const char* const from = input + frame * size;
      char* const to = output + frame * size;
      Moves moves;
      for (int i = 0; i < 3; ++i) {
        const int64_t begin = std::max(row.begin(i), left), end = std::min(row.end(i), right);
        const bool arrives = s.has(frame, steps[i]), leaves = s.has(frame, -steps[i]);
        const char* const source = arrives ? from + steps[i] * size : nullptr;
        if (!scatters || !arrives) moves.add_run(begin, end, source, to);
        if (scatters && leaves) moves.add_run(begin, end, from, to - steps[i] * size);
        for (int seam = 0; seam < row.seam_count; ++seam) {
          moves.seams[seam].from[i] = row.meets(seam, i) ? source : nullptr;
          moves.seams[seam].mask[i] = masks[seam][i];
        }
      }
      moves.seam_count = row.seam_count;
      moves.whole_vectors = row.whole_vectors;
      for (int seam = 0; seam < row.seam_count; ++seam) {
        moves.seams[seam].begin = row.seams[seam];
        moves.seams[seam].to = to;
      }
      (scatters ? move_rows<true> : move_rows<false>)(moves, s.length, first, std::min(first + rows, s.rows));
    }
    if (scatters) stream_fence();
  });
}

// A tile is a few rows of a fold, or a part of one, in all frames of a clip: while it is walked, what is
// read becomes what is overwritten next, so that memory is read and written once.
void shift_bytes_in_place(char* values, const TemporalShiftShape& s, ParallelFor threads) {
  if (s.fold == 0) return;
  const int64_t size = s.frame_size(), part = std::min(column_bytes, s.fold);
  const int64_t rows = std::max<int64_t>(1, column_bytes / s.length);
  const int64_t tall = (s.rows + rows - 1) / rows, wide = (s.fold + part - 1) / part;
  parallel_for(threads, s.clips() * tall * wide, [&](int64_t first_tile, int64_t last_tile) {
    for (int64_t tile = first_tile; tile < last_tile; ++tile) {
      char* const clip = values + tile / (tall * wide) * s.segments * size;
      const int64_t first = tile / wide % tall * rows, last = std::min(first + rows, s.rows);
      const int64_t left = tile % wide * part, bytes = std::min(part, s.fold - left);
      for (int64_t begin = left; begin < s.moved(); begin += s.fold) {
        const int64_t step = s.step_of(begin);
        char* frame = clip + s.first_frame(step) * size + begin;
        for (int64_t walked = 1; walked <= s.segments; ++walked, frame += step * size) {
          const bool is_last = walked == s.segments;
          for (int64_t row = first; row < last; ++row) {
            char* const to = frame + row * s.length;
            move_run(to, is_last ? nullptr : to + step * size, bytes);
          }
        }
      }
    }
  });
}

}  // namespace

template <typename T>
void temporal_shift_vectorized_forward_cpu(const T* input, T* output, const TemporalShiftShape& s,
                                           ParallelFor threads) {
  shift_bytes(reinterpret_cast<const char*>(input), reinterpret_cast<char*>(output), s.in_units(sizeof(T)),
              threads);
}

template <typename T>
void temporal_shift_vectorized_in_place_cpu(T* values, const TemporalShiftShape& s, ParallelFor threads) {
  shift_bytes_in_place(reinterpret_cast<char*>(values), s.in_units(sizeof(T)), threads);
}

#define FASTCONV_INSTANTIATE(T)                                                                   \
  template void temporal_shift_vectorized_forward_cpu<T>(const T*, T*, const TemporalShiftShape&, \
                                                         ParallelFor);                            \
  template void temporal_shift_vectorized_in_place_cpu<T>(T*, const TemporalShiftShape&, ParallelFor);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv::FASTCONV_CPU_CAPABILITY
