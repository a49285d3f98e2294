// The pixels of a pass against panels of filters; see conv2d_direct_cpu.cpp.
#pragma once

#include "../common/moments.h"
#include "../common/prefetch.h"
#include "conv2d_direct_cpu.h"
#include "conv2d_direct_operands_cpu.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {

inline constexpr int64_t l2_bytes = 512 << 10;  // of a panel's weights that are used again and again
inline constexpr int64_t most_pixels = 192;     // that a panel's weights serve before the next panel comes
inline constexpr int64_t few_channels = 16;  // fewer are copied with the padding, and make runs of all taps

struct Chunk {  // rows [begin, end) of a phase, counted through images
  const Phase* phase;
  int64_t begin, end;
};

// E: what is multiplied, A or BFloat16Pair.
template <typename T, typename E>
class Direct {
 public:
  using A = accumulate_t<T>;
  static constexpr int64_t L = lanes_of<A>, line_values = PrefetchRuns::line / int64_t(sizeof(E));

  Direct(const T* input, const E* packed, const Conv2dEpilogue<T>& epilogue, T* output,
         const DirectPass& pass)
      : input_{input, pass.shape.groups * pass.from_group, pass.geometry.in_height, pass.geometry.in_width,
               pass.shape.channels_last},
        packed_(packed),
        epilogue_(epilogue),
        output_{output, pass.shape.groups * pass.to_group, pass.geometry.out_height, pass.geometry.out_width,
                pass.shape.channels_last},
        pass_(pass),
        panels_{pass.to_group},
        from_(ceil_div(pass.from_group, values_in<E>)),
        in_place_(std::is_same_v<T, stored<E>> && pass.shape.channels_last && from_ >= few_channels &&
                  pass.from_group % values_in<E> == 0 && !pass.source),
        pixel_stride_(in_place_ ? input_.channels / values_in<E> : from_),
        columns_(columns_read()),
        streams_(is_clamp(epilogue.activation) &&
                 stores_past_caches(output_, pass.shape.batch, pass.to_group)) {
    const int64_t chunk_pixels = pass.source.pixels > 0 ? pass.source.pixels
                                 : from_ < few_channels ? 2 * most_pixels
                                                        : most_pixels;
    int64_t parts = 0;
    for (const Phase& phase : pass.geometry.phases) {
      const int64_t rows = std::max<int64_t>(1, chunk_pixels / std::max<int64_t>(1, pass.columns(phase)));
      parts = std::max(parts, ceil_div(pass.shape.batch * pass.rows(phase), rows));
      longest_run_ = std::max(longest_run_, run(phase));
    }
    // Phases take turns, for they read the same pixels and write between each other's.
    for (int64_t k = 0; k < parts; ++k)
      for (const Phase& phase : pass.geometry.phases) {
        const int64_t rows = pass.columns(phase) > 0 ? pass.shape.batch * pass.rows(phase) : 0;
        const Chunk chunk{&phase, rows * k / parts, rows * (k + 1) / parts};
        if (chunk.begin == chunk.end) continue;
        chunks_.push_back(chunk);
        chunk_pixels_ = std::max(chunk_pixels_, (chunk.end - chunk.begin) * pass.columns(phase));
        int64_t rows_read = 0;
        for_images(chunk, [&](int64_t, Range read) { rows_read += read.end - read.begin; });
        most_rows_read_ = std::max(most_rows_read_, rows_read);
      }
  }

  int64_t items() const { return int64_t(chunks_.size()) * pass_.shape.groups * panels_.count(); }

  // Values of a channel in each chunk.
  std::vector<int64_t> counts() const {
    std::vector<int64_t> counts;
    for (const Chunk& chunk : chunks_)
      counts.push_back((chunk.end - chunk.begin) * pass_.columns(*chunk.phase));
    return counts;
  }
  // Has compute look at what it stores, in channels_last, each chunk a part; forward alone, where a chunk is
  // one run of pixels.
  void gather(PartMoments& moments) { moments_ = &moments, streams_ = false; }

  void compute(int64_t begin, int64_t end) const {
    Worker worker(*this);
    for (int64_t item = begin; item < end; ++item) {
      const Chunk& chunk = chunks_[item / (pass_.shape.groups * panels_.count())];
      const int64_t group = item / panels_.count() % pass_.shape.groups, panel = item % panels_.count();
      if (worker.chunk != &chunk || worker.group != group) read(worker, chunk, group);
      with_constant<1, most_vectors>(panels_.vectors(panel),
                                     [&](auto vectors) { compute_panel<vectors>(worker, panel); });
      if (moments_) add_moments(chunk, group * pass_.to_group, panel);
    }
    if (streams_) stream_fence();
  }

 private:
  struct Worker {
    explicit Worker(const Direct& of)
        : zeros(of.longest_run_),
          sums((of.chunk_pixels_ + accumulators) * of.panels_.width),
          tile(of.in_place_ ? 0 : of.most_rows_read_ * of.width() * of.from_) {
      std::fill_n(zeros.data(), of.longest_run_, E{});
    }
    Scratch<E> zeros;
    Scratch<A> sums;
    Scratch<E> tile;
    const Chunk* chunk = nullptr;
    int64_t group = 0, first_image = 0;
    PrefetchRuns next;
    std::vector<const E*> images;  // of the chunk: pixel (0, 0), the group's first channel
  };

  template <int R>
  struct Pixels {
    const E* image[R];
    int64_t row[R], column[R];  // that tap (0, 0) reads
    int64_t output[R];          // index of the pixel's first channel in a channels_last output
    bool inner;                 // every tap of a row lies inside the image, for all pixels
  };

  // The columns that a tile of few channels has: with the padding, unless that is wider than the image.
  Range columns_read() const {
    const int64_t width = input_.width;
    int64_t begin = 0, end = width;
    if (from_ < few_channels)
      for (const Phase& phase : pass_.geometry.phases) {
        begin = std::min(begin, -phase.left);
        end = std::max(end, (pass_.columns(phase) - 1) * pass_.geometry.stride_width +
                                (phase.taps_wide - 1) * phase.dilation_width + 1 - phase.left);
      }
    return end - begin <= 2 * width + 16 ? Range{begin, end} : Range{0, width};
  }
  int64_t width() const { return columns_.end - columns_.begin; }

  bool has_runs(const Phase& phase) const { return phase.dilation_width == 1 && pixel_stride_ == from_; }
  int64_t run(const Phase& phase) const { return from_ * (has_runs(phase) ? phase.taps_wide : 1); }

  // visit(image, rows of it that the chunk reads) for each image of a chunk.
  template <typename Visit>
  void for_images(const Chunk& chunk, const Visit& visit) const {
    const Phase& phase = *chunk.phase;
    const Geometry& g = pass_.geometry;
    const int64_t rows = pass_.rows(phase);
    for (int64_t row = chunk.begin; row < chunk.end;) {
      const int64_t n = row / rows, e = row % rows, e_end = std::min(rows, e + chunk.end - row);
      const int64_t low = std::clamp<int64_t>(e * g.stride_height - phase.top, 0, g.in_height);
      const int64_t last =
          (e_end - 1) * g.stride_height + (phase.taps_high - 1) * phase.dilation_height - phase.top;
      visit(n, Range{low, std::clamp<int64_t>(last + 1, low, g.in_height)});
      row += e_end - e;
    }
  }

  // Brings the pixels that a chunk reads into a tile, (rows, width, channels of the group), unless they lie
  // so already.
  void read(Worker& worker, const Chunk& chunk, int64_t group) const {
    worker.chunk = &chunk, worker.group = group;
    worker.images.clear();
    E* tile = worker.tile.data();
    for_images(chunk, [&](int64_t n, Range rows) {
      if (worker.images.empty()) worker.first_image = n;
      const Image<const T> image = input_.data ? input_.next(n) : input_;
      if (in_place_)
        return worker.images.push_back(reinterpret_cast<const E*>(image.data + group * pass_.from_group));
      worker.images.push_back(tile - rows.begin * width() * from_);
      if (rows.begin == rows.end) return;  // the taps of these pixels read padding alone
      if (pass_.source) return bring_rows(n, rows, tile);
      const int64_t channel = group * pass_.from_group, padding = width() - image.width;
      const int64_t runs = padding > 0 ? rows.end - rows.begin : 1;
      const int64_t pixels = (rows.end - rows.begin) * image.width / runs;
      for (int64_t k = 0; k < runs; ++k) {
        tile = std::fill_n(tile, -columns_.begin * from_, E{});
        load_operands(image, channel, pass_.from_group, rows.begin * image.width + k * pixels, pixels, tile);
        tile += pixels * from_;
        tile = std::fill_n(tile, (columns_.end - image.width) * from_, E{});
      }
    });
  }

  // Rows of an image by pass.source onto the end of the tile.
  void bring_rows(int64_t n, Range rows, E*& tile) const {
    const int64_t pixels = (rows.end - rows.begin) * input_.width, channels = input_.channels;
    const bool as_stored = std::is_same_v<T, stored<E>> && channels % values_in<E> == 0;
    const Scratch<T> scratch(as_stored ? 0 : pixels * channels);
    pass_.source.bring(n, rows.begin, rows.end, as_stored ? static_cast<void*>(tile) : scratch.data());
    if (!as_stored) {
      const Image<const T> brought{scratch.data(), channels, rows.end - rows.begin, input_.width, true};
      load_operands(brought, 0, channels, 0, pixels, tile);
    }
    tile += pixels * from_;
  }

  template <int V>
  void compute_panel(Worker& worker, int64_t panel) const {
    constexpr int R = std::min(rows_of<V>, 12);
    const Phase& phase = *worker.chunk->phase;
    const int64_t line = V * L, from = from_, tap_row = phase.taps_wide * from * line;
    const int64_t first = worker.group * pass_.to_group + panel * panels_.width;
    const E* weights = packed_ +
                       (worker.group * panels_.padded() + panel * panels_.width) * from * pass_.shape.taps() +
                       phase.weight_offset * from * line;
    A bias[V * L] = {};
    const int64_t lanes = std::min<int64_t>(V * L, pass_.to_group - panel * panels_.width);
    if (epilogue_.bias)
      for (int64_t lane = 0; lane < lanes; ++lane) bias[lane] = load(epilogue_.bias[first + lane]);

    const int64_t begin = worker.chunk->begin * pass_.columns(phase),
                  end = worker.chunk->end * pass_.columns(phase);
    if (!pass_.shape.channels_last)
      prefetch_chunk(worker.next, worker, first, lanes, ceil_div(end - begin, R), panel == 0);
    const int64_t output_step = phase.column_step * output_.channels;
    const int64_t tap_rows =
        std::max<int64_t>(1, l2_bytes / std::max<int64_t>(1, tap_row * int64_t(sizeof(E))));
    const bool in_one_go = pass_.shape.channels_last && tap_rows >= phase.taps_high;
    for (int64_t i = 0; i == 0 || i < phase.taps_high; i += tap_rows) {
      const int64_t i_end = std::min(phase.taps_high, i + tap_rows);
      Cursor cursor{0, worker.chunk->begin % pass_.rows(phase), worker.chunk->begin / pass_.rows(phase)};
      for (int64_t q = begin; q < end; q += R) {
        Pixels<R> pixels;
        locate(worker, cursor, std::min<int64_t>(R, end - q), pixels);
        // Kept beside each other only where another row of taps, or a transposition, needs them.
        A* sums = worker.sums.data() + (in_one_go ? 0 : (q - begin) * line);
        Vector<A> sum[R][V];
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) sum[r][v] = load_vector((i == 0 ? bias : sums + r * line) + v * L);
        const bool last = i_end == phase.taps_high;
        const int64_t at = pixels.output[0] + R * output_step + first;
        Ahead ahead{pass_.shape.channels_last ? nullptr : &worker.next,
                    streams_ ? nullptr : output_.data + at,
                    epilogue_.residual ? epilogue_.residual + at : nullptr,
                    output_step,
                    in_place_ && panel == 0 ? R * pass_.geometry.stride_width * pixel_stride_ : 0,
                    asks(phase, pixels.inner)};
        add_taps<R, V>(phase, pixels, worker.zeros.data(), weights + i * tap_row, i, i_end,
                       last ? &ahead : nullptr, sum);
        if (last && store_in_place<R, V>(pixels, std::min<int64_t>(R, end - q), first, lanes, sum)) continue;
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) store_vector(sums + r * line + v * L, sum[r][v]);
        if (last && pass_.shape.channels_last)
          for (int64_t r = 0; r < std::min<int64_t>(R, end - q); ++r)
            store_run(sums + r * line, epilogue_, output_.data, pixels.output[r] + first, 1, lanes);
      }
    }
    if (!pass_.shape.channels_last) store_contiguous(worker, first, lanes, line);
  }

  void add_moments(const Chunk& chunk, int64_t group_channel, int64_t panel) const {
    const int64_t filter = panel * panels_.width, columns = pass_.columns(*chunk.phase);
    const int64_t channel = group_channel + filter, row_stride = columns * output_.channels;
    PartMoments::Part(*moments_, &chunk - chunks_.data(), channel,
                      std::min<int64_t>(panels_.width, pass_.to_group - filter))
        .add(PixelRows<T>{output_.data + chunk.begin * row_stride + channel, chunk.end - chunk.begin,
                          row_stride, columns, output_.channels});
  }

  struct Cursor {  // a pixel of a phase
    int64_t column, row, image;
  };

  // Where the next R pixels read and write; those beyond `count` repeat the last.
  template <int R>
  void locate(const Worker& worker, Cursor& at, int64_t count, Pixels<R>& pixels) const {
    const Geometry& g = pass_.geometry;
    const Phase& phase = *worker.chunk->phase;
    const int64_t columns = pass_.columns(phase), rows = pass_.rows(phase);
    pixels.inner = true;
    for (int r = 0; r < R; ++r) {
      pixels.image[r] = worker.images[at.image - worker.first_image];
      pixels.row[r] = at.row * g.stride_height - phase.top;
      pixels.column[r] = at.column * g.stride_width - phase.left - columns_.begin;
      pixels.output[r] =
          ((at.image * g.out_height + phase.first_row + at.row * phase.row_step) * g.out_width +
           phase.first_column + at.column * phase.column_step) *
          output_.channels;
      pixels.inner &= pixels.column[r] >= 0 && pixels.column[r] + phase.taps_wide <= width();
      if (r + 1 >= count && r + 1 < R) continue;
      if (++at.column < columns) continue;
      at.column = 0;
      if (++at.row == rows) at.row = 0, ++at.image;
    }
  }

  // Memory asked for between the computations of a block: at each run of taps, or, where there is one tap,
  // at each cache line of its channels.
  struct Ahead {
    PrefetchRuns* runs;          // of the chunk, or null:
    const T *output, *residual;  // of the next block, or null where they are not asked for
    int64_t output_step;         // between its pixels
    int64_t input;               // distance of what it reads, or 0 where that has been read
    int64_t asks, asked = 0, vector = 0;

    template <int R, int V>
    inline __attribute__((always_inline)) void ask() {
      if (runs) return runs->ask();
      ++asked;
      for (; vector * asks < asked * V; ++vector) {
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
          if (output) prefetch_for_write(output + r * output_step + vector * L);
          if (residual) __builtin_prefetch(residual + r * output_step + vector * L);
        }
      }
    }
  };

  int64_t asks(const Phase& phase, bool inner) const {
    if (phase.taps_high * phase.taps_wide == 1) return ceil_div(from_, line_values);
    return phase.taps_high * (has_runs(phase) && inner ? 1 : phase.taps_wide);
  }

  // What will be touched after the blocks of a chunk, where the pixels of a channel are together: these
  // filters of the output, and what the next chunk reads.
  void prefetch_chunk(PrefetchRuns& next, const Worker& worker, int64_t first, int64_t lanes, int64_t blocks,
                      bool reads) const {
    const Chunk& chunk = *worker.chunk;
    next.clear(blocks * asks(*chunk.phase, true));
    for_runs(chunk, [&](int64_t at, int64_t count) {
      T* run = output_.data + at + first * output_.channel_stride();
      next.add(run, chunk.phase->column_step * count, output_.channel_stride(), lanes);
    });
    if (!reads || !input_.data || &chunk == &chunks_.back()) return;
    for_images((&chunk)[1], [&](int64_t n, Range rows) {
      const int64_t channel = worker.group * pass_.from_group;
      next.add(input_.next(n), channel, channel + pass_.from_group, rows.begin, rows.end);
    });
  }

  // visit(index in the output of its first value in channel 0, pixels) for each run of pixels that a chunk
  // computes.
  template <typename Visit>
  void for_runs(const Chunk& chunk, const Visit& visit) const {
    const Phase& phase = *chunk.phase;
    const int64_t columns = pass_.columns(phase), rows = pass_.rows(phase);
    const bool whole_rows = phase.row_step == 1 && phase.column_step == 1;  // rows follow each other
    for (int64_t row = chunk.begin; row < chunk.end;) {
      const int64_t n = row / rows, e = row % rows;
      const int64_t e_end = whole_rows ? std::min(rows, e + chunk.end - row) : e + 1;
      visit((n * output_.channels * output_.height + phase.first_row + e * phase.row_step) * output_.width +
                phase.first_column,
            (e_end - e) * columns);
      row += e_end - e;
    }
  }

  // Rows [i, i_end) of the taps.
  template <int R, int V>
  inline __attribute__((always_inline)) void add_taps(const Phase& phase, const Pixels<R>& pixels,
                                                      const E* zeros, const E* weights, int64_t i,
                                                      int64_t i_end, Ahead* ahead,
                                                      Vector<A> (&sum)[R][V]) const {
    const Geometry& g = pass_.geometry;
    const bool runs = has_runs(phase) && pixels.inner;
    const bool single = phase.taps_high * phase.taps_wide == 1;
    const int64_t length = runs ? run(phase) : from_, steps = runs ? 1 : phase.taps_wide;
    for (; i < i_end; ++i) {
      for (int64_t j = 0; j < steps; ++j, weights += length * V * L) {
        const E* lines[R];
        bool any = false;
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
          const int64_t row = pixels.row[r] + i * phase.dilation_height;
          const int64_t column = pixels.column[r] + j * phase.dilation_width;
          const bool inside = uint64_t(row) < uint64_t(g.in_height) && uint64_t(column) < uint64_t(width());
          lines[r] = inside ? pixels.image[r] + (row * width() + column) * pixel_stride_ : zeros;
          any |= inside;
        }
        if (!any) continue;
        if (ahead && single) {
          add_single_tap(lines, weights, length, *ahead, sum);
          continue;
        }
        if (ahead) ahead->template ask<R, V>();
        multiply_add(sum, lines, 1, weights, V * L, length);
      }
    }
  }

  template <int R, int V>
  inline __attribute__((always_inline)) void add_single_tap(const E* const (&lines)[R], const E* weights,
                                                            int64_t length, Ahead& ahead,
                                                            Vector<A> (&sum)[R][V]) const {
    for (int64_t k = 0; k < length; k += line_values) {
      const E* rows[R];
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        rows[r] = lines[r] + k;
        if (ahead.input > 0) __builtin_prefetch(rows[r] + ahead.input);
      }
      ahead.template ask<R, V>();
      multiply_add(sum, rows, 1, weights + k * V * L, V * L, std::min(line_values, length - k));
    }
  }

  // The usual case, straight from the registers; false, and nothing done, where there is more to do.
  template <int R, int V>
  inline __attribute__((always_inline)) bool store_in_place(const Pixels<R>& pixels, int64_t count,
                                                            int64_t first, int64_t lanes,
                                                            Vector<A> (&sum)[R][V]) const {
    if constexpr (std::is_same_v<T, A>) {
      if (!pass_.shape.channels_last || !is_clamp(epilogue_.activation)) return false;
      const Vector<A> least = broadcast(floor_of<A>(epilogue_.activation));
      const Vector<A> most = broadcast(ceiling_of<A>(epilogue_.activation));
      const int64_t rest = lanes - (V - 1) * L;  // of the last vector
      if (epilogue_.residual) {
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
          if (r >= count) break;
          const A* residual = epilogue_.residual + pixels.output[r] + first;
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v)
            sum[r][v] +=
                v < V - 1 || rest == L ? load_vector(residual + v * L) : load_lanes(residual + v * L, rest);
        }
      }
      const auto store_all = [&](const auto& store_one) {
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
          if (r >= count) return;
          A* target = output_.data + pixels.output[r] + first;
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) {
            Vector<A> value = sum[r][v] < least ? least : sum[r][v];
            value = value > most ? most : value;
            store_one(target + v * L, value, v == V - 1);
          }
        }
      };
      if (rest < L)
        store_all([&](A* target, Vector<A> value, bool last) {
          last ? store_lanes(target, value, rest) : store_vector(target, value);
        });
      else
        with_store<A>(streams_, [&](const auto& store_one) {
          store_all([&](A* target, Vector<A> value, bool) { store_one(target, value); });
        });
      return true;
    }
    return false;
  }

  // The sums of a chunk, (pixels, line), into contiguous images: transposed L pixels at a time.
  void store_contiguous(const Worker& worker, int64_t first, int64_t lanes, int64_t line) const {
    const int64_t step = worker.chunk->phase->column_step;
    const A* sums = worker.sums.data();
    for_runs(*worker.chunk, [&](int64_t at, int64_t count) {
      for (int64_t c = 0; c < lanes; c += L) {
        for (int64_t k = 0; k < count; k += L) {
          A square[L][L];
          transpose_square<A>([&](int pixel) { return sums + (k + pixel) * line + c; },
                              [&](int lane) { return square[lane]; });
          for (int64_t lane = 0; lane < std::min(L, lanes - c); ++lane)
            store_run(square[lane], epilogue_, output_.data,
                      at + (first + c + lane) * output_.channel_stride() + k * step, step,
                      std::min(L, count - k));
        }
      }
      sums += count * line;
    });
  }

  Image<const T> input_;
  const E* packed_;
  const Conv2dEpilogue<T>& epilogue_;
  Image<T> output_;
  const DirectPass& pass_;
  Panels<A> panels_;
  int64_t from_;  // values of E that a group of channels takes
  bool in_place_;
  int64_t pixel_stride_;  // between two pixels of what is read
  Range columns_;         // of the image that are read
  bool streams_;          // store past the caches
  int64_t longest_run_ = 1, chunk_pixels_ = 0, most_rows_read_ = 0;
  std::vector<Chunk> chunks_;
  PartMoments* moments_ = nullptr;  // of what is stored, or null
};

}  // namespace fastconv::FASTCONV_CPU_CAPABILITY
