// Convolution, C++, im2col: contiguous images, a panel of columns at a time.
//
// Formula: conv2d.h, as output (M, pixels) = weights (M, C/G * taps) * columns (C/G * taps, pixels).
// One step: the columns of 64 output pixels (AVX-512), one line for each channel and tap, are gathered into
//   a panel in the L2 cache; then 6 filters x 64 pixels are summed in registers: one weight meets 64 pixels.
//   The matrix of all columns, kernel_height * kernel_width times the image, is never in memory.
// Bytes: the input once for each tap, mostly from the L1 cache; the weights once for each panel.
// Against direct: lanes are pixels, not filters, so that contiguous images are read and written without a
//   transpose.
// Limits: multiply-adds; few filters, for which gathering (a load and a store for each 16 values) is no
//   trifle.
#include "conv2d_im2col_cpu.h"
#include "../common/prefetch.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {
namespace {

constexpr int64_t most_lines = 2560;  // of a panel: 640 KB with AVX-512
constexpr int64_t least_items = 8;    // for threads to share
constexpr int64_t ask_lines = 16;     // computed between two asks for memory

template <typename T>
class Im2col {
 public:
  using A = accumulate_t<T>;
  static constexpr int64_t L = lanes_of<A>, width = most_vectors * L;

  Im2col(const T* input, const A* packed, const Conv2dEpilogue<T>& epilogue, T* output,
         const DirectPass& pass)
      : input_(input),
        packed_(packed),
        epilogue_(epilogue),
        output_(output),
        pass_(pass),
        in_pixels_(pass.geometry.in_height * pass.geometry.in_width),
        out_pixels_(pass.geometry.out_height * pass.geometry.out_width),
        input_end_(input + pass.shape.batch * pass.shape.groups * pass.from_group * in_pixels_) {
    int64_t panels = 0;
    for (const Phase& phase : pass.geometry.phases)
      panels = std::max(panels, ceil_div(pass.pixels(phase), width));
    for (int64_t k = 0; k < panels; ++k)  // phases take turns, for they write between each other's pixels
      for (const Phase& phase : pass.geometry.phases)
        if (k * width < pass.pixels(phase)) panels_.push_back({&phase, k * width});
    // Parts of the filters gather the same columns again.
    const int64_t most = std::max<int64_t>(1, pass.to_group / 96);
    parts_ = std::clamp<int64_t>(
        ceil_div(least_items, std::max<int64_t>(1, int64_t(panels_.size()) * pass.shape.groups)), 1, most);
  }

  int64_t items() const { return int64_t(panels_.size()) * pass_.shape.groups * parts_; }

  void compute(int64_t begin, int64_t end) const {
    int64_t lines = 1;
    bool turns = false;
    for (const Phase& phase : pass_.geometry.phases) {
      lines = std::max(lines, channels_at_once(phase) * phase.taps_high * phase.taps_wide);
      turns |= channels_at_once(phase) < pass_.from_group;
    }
    const Scratch<A> columns(lines * width + L);
    const Scratch<A> partial(turns ? ceil_div(pass_.to_group, parts_) * width : 0);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t part = item % parts_, group = item / parts_ % pass_.shape.groups;
      const Panel& panel = panels_[item / parts_ / pass_.shape.groups];
      Worker worker{
          *panel.phase,   group,         pass_.to_group * part / parts_, pass_.to_group * (part + 1) / parts_,
          columns.data(), partial.data()};
      locate(worker, panel.first);
      const int64_t channels = channels_at_once(worker.phase);
      for (int64_t c = 0; c == 0 || c < pass_.from_group; c += channels) {
        const int64_t c_end = std::min(pass_.from_group, c + channels);
        gather(worker, c, c_end);
        prefetch(worker, c_end - c, c_end == pass_.from_group);
        with_constant<1, most_vectors>(ceil_div(worker.pixels, L),
                                       [&](auto vectors) { multiply<vectors>(worker, c, c_end); });
      }
    }
  }

 private:
  // Channels whose columns a panel holds; the others take their turns.
  int64_t channels_at_once(const Phase& phase) const {
    const int64_t taps = std::max<int64_t>(1, phase.taps_high * phase.taps_wide);
    return std::clamp<int64_t>(most_lines / taps, 1, pass_.from_group);
  }

  struct Panel {  // pixels [first, first + width) of a phase, counted through rows and images
    const Phase* phase;
    int64_t first;
  };
  struct Run {  // pixels of a panel that lie side by side in a row of an image
    int64_t lane, count, image, row, column;
  };
  static constexpr int64_t padding = std::numeric_limits<int64_t>::min();
  struct Piece {  // lanes of a channel's lines, at `target`, and the pixel of the channel's image that the
                  // first reads
    int64_t target, count, source;
  };
  struct Worker {
    const Phase& phase;
    int64_t group, filter, filter_end;
    A *columns, *partial;
    PrefetchRuns next = {};
    int64_t pixels = 0;
    std::vector<Run> runs = {};
    std::vector<Piece> pieces = {};

    int64_t taps() const { return phase.taps_high * phase.taps_wide; }
  };

  // The runs of pixels of a panel, and for each tap the pieces of a line that they fill.
  void locate(Worker& worker, int64_t first) const {
    const Phase& phase = worker.phase;
    const Geometry& g = pass_.geometry;
    const int64_t columns = pass_.columns(phase), rows = pass_.rows(phase);
    worker.pixels = std::min(width, pass_.pixels(phase) - first);
    worker.runs.clear();
    int64_t f = first % columns, e = first / columns % rows, n = first / columns / rows;
    for (int64_t lane = 0; lane < worker.pixels;) {
      const int64_t count = std::min(columns - f, worker.pixels - lane);
      worker.runs.push_back({lane, count, n, e, f});
      lane += count, f = 0;
      if (++e == rows) e = 0, ++n;
    }
    worker.pieces.clear();
    const auto add = [&](int64_t target, int64_t count, int64_t source) {
      if (count > 0) worker.pieces.push_back({target, count, source});
    };
    for (int64_t t = 0; t < worker.taps(); ++t)
      for (const Run& run : worker.runs) {
        const int64_t row =
            run.row * g.stride_height + t / phase.taps_wide * phase.dilation_height - phase.top;
        const int64_t column =
            run.column * g.stride_width + t % phase.taps_wide * phase.dilation_width - phase.left;
        const bool outside = uint64_t(row) >= uint64_t(g.in_height);
        const Range inside =
            outside ? Range{0, 0} : outputs_inside(column, g.stride_width, g.in_width, run.count);
        const int64_t target = t * width + run.lane;
        const int64_t image = (run.image * pass_.shape.groups + worker.group) * pass_.from_group * in_pixels_;
        add(target, inside.begin, padding);
        add(target + inside.begin, inside.end - inside.begin,
            image + row * g.in_width + column + inside.begin * g.stride_width);
        add(target + inside.end, run.count - inside.end, padding);
      }
  }

  // The columns of channels [c, c_end): (channels, taps, width). Pieces are written as whole vectors, over
  // lanes that the next piece fills.
  void gather(const Worker& worker, int64_t c, int64_t c_end) const {
    A* target = worker.columns;
    for (const T* channel = input_ + c * in_pixels_; c < c_end; ++c, channel += in_pixels_) {
      for (const Piece& piece : worker.pieces) {
        A* line = target + piece.target;
        if (piece.source == padding) {
          for (int64_t k = 0; k < piece.count; k += L) store_vector(line + k, Vector<A>{});
        } else {
          gather_piece(channel + piece.source, piece.count, line);
        }
      }
      target += worker.taps() * width;
    }
  }

  // Every stride_width-th pixel of a row.
  void gather_piece(const T* source, int64_t count, A* target) const {
    const int64_t stride = pass_.geometry.stride_width;
    int64_t k = 0;
    if (stride == 1) {
      for (; k < count && source + k + L <= input_end_; k += L)
        store_vector(target + k, load_vector(source + k));
    } else if (stride == 2) {
      LaneIndex<A> even;
#pragma GCC unroll 16
      for (int lane = 0; lane < L; ++lane) even[lane] = 2 * lane;
      for (; k < count && source + 2 * k + 2 * L <= input_end_; k += L)
        store_vector(target + k,
                     __builtin_shuffle(load_vector(source + 2 * k), load_vector(source + 2 * k + L), even));
    }
    for (; k < count; ++k) target[k] = load(source[k * stride]);
  }

  // Will be asked for while the panel is multiplied: of the output, whose filters lie far apart, what the
  // next filters write, and of the input what the next panel reads.
  void prefetch(Worker& worker, int64_t channels, bool last) const {
    const Phase& phase = worker.phase;
    const Geometry& g = pass_.geometry;
    const Run& run = worker.runs.front();
    const int64_t filters = worker.filter_end - worker.filter;
    worker.next.clear(ceil_div(filters, rows_of<most_vectors>) *
                      ceil_div(channels * worker.taps(), ask_lines));
    if (!last) return;
    const int64_t image = run.image * pass_.shape.groups + worker.group;
    const int64_t at = (image * pass_.to_group + worker.filter + rows_of<most_vectors>)*out_pixels_ +
                       (phase.first_row + run.row * phase.row_step) * g.out_width + phase.first_column +
                       run.column * phase.column_step;
    const int64_t count = worker.pixels * phase.column_step, rest = filters - rows_of<most_vectors>;
    worker.next.add(output_ + at, count, out_pixels_, rest);
    if (epilogue_.residual) worker.next.add(epilogue_.residual + at, count, out_pixels_, rest);
    if (worker.taps() > 1) return;  // most of it has been read for the tap above
    const int64_t row = run.row * g.stride_height - phase.top;
    const int64_t pixel = row * g.in_width + (run.column + width) * g.stride_width - phase.left;
    worker.next.add(input_ + image * pass_.from_group * in_pixels_ + pixel, width * g.stride_width,
                    in_pixels_, pass_.from_group);
  }

  template <int V>
  void multiply(Worker& worker, int64_t c, int64_t c_end) const {
    int64_t m = worker.filter;
    for (; m + 6 <= worker.filter_end; m += 6) multiply_filters<6, V>(worker, m, c, c_end);
    if (m + 4 <= worker.filter_end) multiply_filters<4, V>(worker, m, c, c_end), m += 4;
    if (m + 2 <= worker.filter_end) multiply_filters<2, V>(worker, m, c, c_end), m += 2;
    if (m < worker.filter_end) multiply_filters<1, V>(worker, m, c, c_end);
  }

  template <int R, int V>
  void multiply_filters(Worker& worker, int64_t m, int64_t c, int64_t c_end) const {
    const int64_t taps = worker.taps(), lines = pass_.from_group * taps,
                  filter = worker.group * pass_.to_group + m;
    const A* weights = packed_ + worker.group * pass_.to_group * pass_.from_group * pass_.shape.taps() +
                       worker.phase.weight_offset * pass_.from_group * pass_.to_group + m * lines + c * taps;
    A* sums = worker.partial + (m - worker.filter) * width;
    Vector<A> sum[R][V];
    const A* rows[R];
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      rows[r] = weights + r * lines;
      const Vector<A> bias = broadcast(epilogue_.bias ? A(load(epilogue_.bias[filter + r])) : A(0));
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] = c == 0 ? bias : load_vector(sums + r * width + v * L);
    }
    const int64_t count = (c_end - c) * taps;
    for (int64_t k = 0; k < count; k += ask_lines) {
      worker.next.ask();
      const A* values[R];
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) values[r] = rows[r] + k;
      multiply_add(sum, values, 1, worker.columns + k * width, width, std::min(ask_lines, count - k));
    }
    if (c_end < pass_.from_group) {
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) store_vector(sums + r * width + v * L, sum[r][v]);
      return;
    }
    if (store_in_place<R, V>(worker, filter, sum)) return;
    A block[R][width];
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) store_vector(block[r] + v * L, sum[r][v]);
    for (int r = 0; r < R; ++r) finish(worker, filter + r, block[r]);
  }

  // The usual case, a panel of consecutive pixels, straight from the registers; false, and nothing done,
  // where there is more to do.
  template <int R, int V>
  inline __attribute__((always_inline)) bool store_in_place(const Worker& worker, int64_t filter,
                                                            Vector<A> (&sum)[R][V]) const {
    if constexpr (std::is_same_v<T, A>) {
      const Phase& phase = worker.phase;
      const Run &run = worker.runs.front(), &last = worker.runs.back();
      if (worker.pixels < V * L || run.image != last.image || phase.row_step > 1 || phase.column_step > 1 ||
          !is_floor(epilogue_.activation))
        return false;
      const int64_t at = (run.image * pass_.shape.groups * pass_.to_group + filter) * out_pixels_ +
                         run.row * pass_.geometry.out_width + run.column;
      const Vector<A> least = broadcast(floor_of<A>(epilogue_.activation));
      if (epilogue_.residual) {
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v)
            sum[r][v] += load_vector(epilogue_.residual + at + r * out_pixels_ + v * L);
      }
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v)
          store_vector(output_ + at + r * out_pixels_ + v * L, sum[r][v] < least ? least : sum[r][v]);
      return true;
    }
    return false;
  }

  // Pixels of a filter, from the lanes to where they lie.
  void finish(const Worker& worker, int64_t filter, const A* sums) const {
    const Geometry& g = pass_.geometry;
    const Phase& phase = worker.phase;
    const int64_t channels = pass_.shape.groups * pass_.to_group;
    for (int64_t k = 0; k < int64_t(worker.runs.size()); ++k) {
      const Run& run = worker.runs[k];
      const int64_t at = (run.image * channels + filter) * out_pixels_ +
                         (phase.first_row + run.row * phase.row_step) * g.out_width + phase.first_column +
                         run.column * phase.column_step;
      int64_t count = run.count;
      if (phase.row_step == 1 && phase.column_step == 1) {  // rows of an image follow each other
        while (k + 1 < int64_t(worker.runs.size()) && worker.runs[k + 1].image == run.image)
          count += worker.runs[++k].count;
      }
      store_run(sums + run.lane, epilogue_, output_, at, phase.column_step, count);
    }
  }

  const T* input_;
  const A* packed_;
  const Conv2dEpilogue<T>& epilogue_;
  T* output_;
  const DirectPass& pass_;
  int64_t in_pixels_, out_pixels_;
  const T* input_end_;
  int64_t parts_;
  std::vector<Panel> panels_;
};

}  // namespace

template <typename T>
void im2col_pack(const T* weight, accumulate_t<T>* packed, const DirectPass& pass, ParallelFor threads) {
  const int64_t from = pass.from_group, to = pass.to_group, taps = pass.shape.taps();
  const Geometry& g = pass.geometry;
  parallel_for(threads, pass.shape.groups * to, [&](int64_t begin, int64_t end) {
    for (int64_t filter = begin; filter < end; ++filter) {
      const int64_t group = filter / to, m = filter % to;
      for (const Phase& phase : g.phases) {
        const int64_t count = phase.taps_high * phase.taps_wide;
        accumulate_t<T>* target =
            packed + (group * int64_t(g.taps.size()) + phase.weight_offset) * from * to + m * from * count;
        for (int64_t c = 0; c < from; ++c) {
          const T* source =
              weight + (pass.transposed ? (group * from + c) * to + m : filter * from + c) * taps;
          for (int64_t k = 0; k < count; ++k) *target++ = load(source[g.taps[phase.weight_offset + k]]);
        }
      }
    }
  });
}

template <typename T>
void im2col_convolve(const T* input, const accumulate_t<T>* packed, const Conv2dEpilogue<T>& epilogue,
                     T* output, const DirectPass& pass, ParallelFor threads) {
  const Im2col<T> im2col(input, packed, epilogue, output, pass);
  parallel_for(threads, im2col.items(), [&](int64_t begin, int64_t end) { im2col.compute(begin, end); });
}

template <typename T>
int64_t conv2d_im2col_packed_size(const Conv2dShape& s) {
  return s.out_channels * s.in_group() * s.taps();
}

template <typename T>
void conv2d_im2col_pack_weight_cpu(const T* weight, accumulate_t<T>* packed, const Conv2dShape& s,
                                   ParallelFor threads) {
  im2col_pack(weight, packed, direct_forward(s), threads);
}

template <typename T>
void conv2d_im2col_forward_cpu(const T* input, const accumulate_t<T>* packed,
                               const Conv2dEpilogue<T>& epilogue, T* output, const Conv2dShape& s,
                               ParallelFor threads) {
  im2col_convolve(input, packed, epilogue, output, direct_forward(s), threads);
}

// Direct's serves contiguous images as well: its tiles hold each value once, not once for each tap.
template <typename T>
void conv2d_im2col_grad_weight_cpu(const T* grad_output, const T* input, T* grad_weight, T* grad_bias,
                                   const Conv2dShape& s, ParallelFor threads) {
  conv2d_direct_grad_weight_cpu(grad_output, input, grad_weight, grad_bias, s, threads);
}

#define FASTCONV_INSTANTIATE(T)                                                                             \
  template void im2col_pack(const T*, accumulate_t<T>*, const DirectPass&, ParallelFor);                    \
  template void im2col_convolve(const T*, const accumulate_t<T>*, const Conv2dEpilogue<T>&, T*,             \
                                const DirectPass&, ParallelFor);                                            \
  template int64_t conv2d_im2col_packed_size<T>(const Conv2dShape&);                                        \
  template void conv2d_im2col_pack_weight_cpu(const T*, accumulate_t<T>*, const Conv2dShape&, ParallelFor); \
  template void conv2d_im2col_forward_cpu(const T*, const accumulate_t<T>*, const Conv2dEpilogue<T>&, T*,   \
                                          const Conv2dShape&, ParallelFor);                                 \
  template void conv2d_im2col_grad_weight_cpu(const T*, const T*, T*, T*, const Conv2dShape&, ParallelFor);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv::FASTCONV_CPU_CAPABILITY
