// Columns of a panel of pixels against blocks of filters; see conv2d_im2col_cpu.cpp.
#pragma once

#include "../common/prefetch.h"
#include "conv2d_im2col_cpu.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {

inline constexpr int64_t most_lines = 2560;  // of a panel: 640 KB with AVX-512
inline constexpr int64_t least_items = 8;    // for threads to share
inline constexpr int64_t ask_lines = 16;     // computed between two asks for memory
inline constexpr int64_t few_filters = 24;

template <typename T>
class Im2col {
 public:
  using A = accumulate_t<T>;
  static constexpr int64_t L = lanes_of<A>, width = most_vectors * L;

  Im2col(const T* input, const A* packed, const Conv2dEpilogue<T>& epilogue, T* output,
         const Im2colPass& pass)
      : input_(input),
        packed_(packed),
        epilogue_(epilogue),
        output_(output),
        pass_(pass),
        channels_last_(pass.shape.channels_last),
        in_channels_(pass.shape.groups * pass.from_group),
        out_channels_(pass.shape.groups * pass.to_group),
        in_pixels_(pass.geometry.in_height * pass.geometry.in_width),
        out_pixels_(pass.geometry.out_height * pass.geometry.out_width),
        input_end_(input + pass.shape.batch * in_channels_ * in_pixels_),
        groups_at_once_(channels_last_ && pass.shuffled ? pass.shape.groups : 1),
        group_sets_(pass.shape.groups / groups_at_once_) {
    if (pass.offsets)
      find_offsets();
    else
      for (const Phase& phase : pass.geometry.phases) offsets_.push_back(tap_offsets(phase));
    int64_t panels = 0;
    for (const Phase& phase : pass.geometry.phases)
      panels = std::max(panels, ceil_div(pass.pixels(phase), width));
    for (int64_t k = 0; k < panels; ++k)  // phases take turns, for they write between each other's pixels
      for (const Phase& phase : pass.geometry.phases)
        if (k * width < pass.pixels(phase)) panels_.push_back({&phase, k * width});
    // Parts of the filters gather the same columns again.
    const int64_t most = groups_at_once_ > 1 ? 1 : std::max<int64_t>(1, pass.to_group / 96);
    parts_ = std::clamp<int64_t>(
        ceil_div(least_items, std::max<int64_t>(1, int64_t(panels_.size()) * group_sets_)), 1, most);
  }

  int64_t items() const { return int64_t(panels_.size()) * group_sets_ * parts_; }

  void compute(int64_t begin, int64_t end) const {
    int64_t lines = 1;
    bool turns = false;
    for (const Phase& phase : pass_.geometry.phases) {
      lines = std::max(lines, channels_at_once(phase) * lines_of(phase));
      turns |= channels_at_once(phase) < pass_.from_group;
    }
    const Scratch<A> columns(lines * width + L);
    const Scratch<A> sums(
        turns || channels_last_ ? (groups_at_once_ * ceil_div(pass_.to_group, parts_) + L) * width : 0);
    const Scratch<T> zeros(channels_last_ ? pass_.from_group : 0);
    std::fill_n(zeros.data(), channels_last_ ? pass_.from_group : 0, T{});
    Worker worker{columns.data(), sums.data(), zeros.data()};
    for (int64_t item = begin; item < end; ++item) {
      const int64_t part = item % parts_, first = item / parts_ % group_sets_ * groups_at_once_;
      const Panel& panel = panels_[item / parts_ / group_sets_];
      worker.phase = panel.phase;
      worker.filter = pass_.to_group * part / parts_;
      worker.filter_end = pass_.to_group * (part + 1) / parts_;
      locate(worker, panel.first);
      const int64_t channels = channels_at_once(*worker.phase);
      for (worker.group = first; worker.group < first + groups_at_once_; ++worker.group)
        for (int64_t c = 0; c == 0 || c < pass_.from_group; c += channels) {
          const int64_t c_end = std::min(pass_.from_group, c + channels);
          if (!read_in_place(worker, c)) gather(worker, c, c_end);
          prefetch(worker, c_end - c, c_end == pass_.from_group);
          with_constant<1, most_vectors>(ceil_div(worker.pixels, L),
                                         [&](auto vectors) { multiply<vectors>(worker, c, c_end); });
        }
      if (channels_last_) store_channels(worker, first);
    }
  }

 private:
  // Where a line of columns comes from: a tap, or an offset of some channels.
  struct Offset {
    int64_t high, wide;
    bool operator==(const Offset&) const = default;
  };
  struct Panel {  // pixels [first, first + width) of a phase, counted through rows and images
    const Phase* phase;
    int64_t first;
  };
  struct Run {  // pixels of a panel that lie side by side in a row of an image
    int64_t lane, count, image, row, column;
  };
  static constexpr int64_t padding = std::numeric_limits<int64_t>::min();
  struct Piece {  // lanes of a line, and where the first reads, counted from the input's first channel
    int64_t lane, count, at;
  };
  struct Worker {
    A *columns, *sums;
    const T* zeros;
    const A* lines = nullptr;  // the columns, or what stands in for them, `line_step` apart
    int64_t line_step = 0;
    const Phase* phase = nullptr;
    int64_t group = 0, filter = 0, filter_end = 0, pixels = 0;
    PrefetchRuns next = {};
    std::vector<Run> runs = {};
    std::vector<std::vector<Piece>> pieces = {};  // of each source
    std::vector<int64_t> outputs = {};            // of each lane, its first channel: channels_last alone
  };

  static std::vector<Offset> tap_offsets(const Phase& phase) {
    std::vector<Offset> taps;
    for (int64_t i = 0; i < phase.taps_high; ++i)
      for (int64_t j = 0; j < phase.taps_wide; ++j)
        taps.push_back({i * phase.dilation_height - phase.top, j * phase.dilation_width - phase.left});
    return taps;
  }

  // The offsets of a shift, each once, and which of them each channel has.
  void find_offsets() {
    std::vector<Offset>& found = offsets_.emplace_back();
    for (int64_t c = 0; c < in_channels_; ++c) {
      const Offset offset{limited(pass_.offsets[2 * c], pass_.geometry.in_height),
                          limited(pass_.offsets[2 * c + 1], pass_.geometry.in_width)};
      const int64_t source = std::ranges::find(found, offset) - found.begin();
      if (source == int64_t(found.size())) found.push_back(offset);
      sources_.push_back(source);
    }
  }

  int64_t lines_of(const Phase& phase) const { return pass_.offsets ? 1 : phase.taps_high * phase.taps_wide; }

  // The first of a channel's sources; it has one for each of its lines.
  int64_t source_of(int64_t group, int64_t channel) const {
    return pass_.offsets ? sources_[group * pass_.from_group + channel] : 0;
  }

  // Channels whose columns a panel holds; the others take their turns.
  int64_t channels_at_once(const Phase& phase) const {
    return std::clamp<int64_t>(most_lines / std::max<int64_t>(1, lines_of(phase)), 1, pass_.from_group);
  }

  // Which channel of the output a filter is; the next filter's is channel_step() further.
  int64_t channel(int64_t group, int64_t filter) const {
    return pass_.shuffled ? filter * pass_.shape.groups + group : group * pass_.to_group + filter;
  }
  int64_t channel_step() const { return pass_.shuffled ? pass_.shape.groups : 1; }

  // The runs of pixels of a panel, and the pieces of a line that they fill from each source.
  void locate(Worker& worker, int64_t first) const {
    const Phase& phase = *worker.phase;
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
    worker.outputs.clear();
    if (channels_last_)
      for (const Run& run : worker.runs)
        for (int64_t k = 0; k < run.count; ++k)
          worker.outputs.push_back(
              ((run.image * g.out_height + phase.first_row + run.row * phase.row_step) * g.out_width +
               phase.first_column + (run.column + k) * phase.column_step) *
              out_channels_);
    const std::vector<Offset>& offsets = offsets_[&phase - g.phases.data()];
    worker.pieces.resize(offsets.size());
    for (size_t k = 0; k < offsets.size(); ++k) {
      worker.pieces[k].clear();
      for (const Run& run : worker.runs) add_pieces(run, offsets[k], worker.pieces[k]);
    }
  }

  void add_pieces(const Run& run, const Offset& offset, std::vector<Piece>& pieces) const {
    const Geometry& g = pass_.geometry;
    const int64_t row = run.row * g.stride_height + offset.high;
    const int64_t column = run.column * g.stride_width + offset.wide;
    const bool outside = uint64_t(row) >= uint64_t(g.in_height);
    const Range inside =
        outside ? Range{0, 0} : outputs_inside(column, g.stride_width, g.in_width, run.count);
    // Rows that follow each other without a gap are one piece.
    const int64_t step = (channels_last_ ? in_channels_ : 1) * g.stride_width;
    const auto add = [&](int64_t begin, int64_t end, int64_t at) {
      if (begin == end) return;
      if (at != padding && !pieces.empty() && pieces.back().at + pieces.back().count * step == at)
        pieces.back().count += end - begin;
      else
        pieces.push_back({run.lane + begin, end - begin, at});
    };
    const int64_t pixel = row * g.in_width + column + inside.begin * g.stride_width;
    add(0, inside.begin, padding);
    add(inside.begin, inside.end,
        channels_last_ ? (run.image * in_pixels_ + pixel) * in_channels_
                       : run.image * in_channels_ * in_pixels_ + pixel);
    add(inside.end, run.count, padding);
  }

  // Whether the lines can be read where they lie: pixels side by side in each plane. For few filters alone:
  // planes lie in as many pages, which gathering visits once, and each block of filters again.
  bool read_in_place(Worker& worker, int64_t c) const {
    worker.lines = worker.columns, worker.line_step = width;
    if constexpr (std::is_same_v<T, A>) {
      if (channels_last_ || pass_.offsets || lines_of(*worker.phase) != 1 ||
          pass_.geometry.stride_width != 1 || worker.filter_end - worker.filter > few_filters)
        return false;
      const std::vector<Piece>& pieces = worker.pieces[0];
      if (pieces.size() != 1 || pieces[0].at == padding || worker.pixels % L != 0) return false;
      worker.lines = input_ + pieces[0].at + (worker.group * pass_.from_group + c) * in_pixels_;
      worker.line_step = in_pixels_;
      return true;
    }
    return false;
  }

  // The columns of channels [c, c_end) of the group: (channels, lines of a channel, width).
  void gather(const Worker& worker, int64_t c, int64_t c_end) const {
    if (!channels_last_) return gather_planes(worker, c, c_end);
    for (int64_t begin = c, next = c; begin < c_end; begin = next) {
      const int64_t source = source_of(worker.group, begin);
      while (next < c_end && source_of(worker.group, next) == source) ++next;
      gather_channels(worker, source, begin, next,
                      worker.columns + (begin - c) * lines_of(*worker.phase) * width);
    }
  }

  // Contiguous images: a line for each channel and source. Pieces are written as whole vectors, over lanes
  // that the next piece fills.
  void gather_planes(const Worker& worker, int64_t c, int64_t c_end) const {
    A* line = worker.columns;
    const int64_t lines = lines_of(*worker.phase);
    const T* channel = input_ + (worker.group * pass_.from_group + c) * in_pixels_;
    for (; c < c_end; ++c, channel += in_pixels_) {
      const int64_t source = source_of(worker.group, c);
      for (int64_t s = source; s < source + lines; ++s, line += width)
        for (const Piece& piece : worker.pieces[s]) {
          if (piece.at == padding) {
            for (int64_t k = 0; k < piece.count; k += L) store_vector(line + piece.lane + k, Vector<A>{});
          } else {
            gather_piece(channel + piece.at, piece.count, line + piece.lane);
          }
        }
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

  // channels_last: channels [begin, end), which have the same sources, of L pixels at a time, transposed.
  void gather_channels(const Worker& worker, int64_t source, int64_t begin, int64_t end, A* columns) const {
    const int64_t lines = lines_of(*worker.phase), channels = end - begin;
    const T* first = input_ + worker.group * pass_.from_group + begin;
    const int64_t step = pass_.geometry.stride_width * in_channels_;
    for (int64_t s = 0; s < lines; ++s) {
      const T* pixels[width];
      std::fill_n(pixels, width, worker.zeros);
      for (const Piece& piece : worker.pieces[source + s])
        if (piece.at != padding)
          for (int64_t k = 0; k < piece.count; ++k) pixels[piece.lane + k] = first + piece.at + k * step;
      A* target = columns + s * width;
      for (int64_t lane = 0; lane < worker.pixels; lane += L) {
        for (int64_t k = 0; channels >= L && k < channels; k += L) {
          const int64_t at = std::min(k, channels - L);  // the last block overlaps the one before
          transpose_square<A>([&](int row) { return pixels[lane + row] + at; },
                              [&](int column) { return target + (at + column) * lines * width + lane; });
        }
        for (int64_t k = 0; channels < L && k < channels; ++k)
          for (int64_t row = 0; row < L; ++row)
            target[k * lines * width + lane + row] = load(pixels[lane + row][k]);
      }
    }
  }

  // Will be asked for while the panel is multiplied: of the output, whose filters lie far apart, what the
  // next filters write, and of the input what the next panel reads.
  void prefetch(Worker& worker, int64_t channels, bool last) const {
    const Phase& phase = *worker.phase;
    const Geometry& g = pass_.geometry;
    const Run& run = worker.runs.front();
    const int64_t filters = worker.filter_end - worker.filter;
    worker.next.clear(ceil_div(filters, rows_of<most_vectors>) *
                      ceil_div(channels * lines_of(phase), ask_lines));
    if (!last) return;
    const int64_t pixel = (run.row * g.stride_height - phase.top) * g.in_width +
                          (run.column + width) * g.stride_width - phase.left;
    const bool once = lines_of(phase) == 1;  // else most of it has been read for the tap above
    if (channels_last_) {
      const int64_t at = worker.outputs[0] + worker.group * pass_.to_group + worker.filter;
      const int64_t step = phase.column_step * out_channels_;
      worker.next.add(output_ + at, filters, step, worker.pixels);
      if (epilogue_.residual) worker.next.add(epilogue_.residual + at, filters, step, worker.pixels);
      if (once)
        worker.next.add(
            input_ + (run.image * in_pixels_ + pixel) * in_channels_ + worker.group * pass_.from_group,
            pass_.from_group, g.stride_width * in_channels_, width);
      return;
    }
    const int64_t skipped = rows_of<most_vectors>, step = channel_step() * out_pixels_;
    const int64_t at =
        (run.image * out_channels_ + channel(worker.group, worker.filter + skipped)) * out_pixels_ +
        (phase.first_row + run.row * phase.row_step) * g.out_width + phase.first_column +
        run.column * phase.column_step;
    const int64_t count = worker.pixels * phase.column_step;
    worker.next.add(output_ + at, count, step, filters - skipped);
    if (epilogue_.residual) worker.next.add(epilogue_.residual + at, count, step, filters - skipped);
    if (once)
      worker.next.add(
          input_ + (run.image * in_channels_ + worker.group * pass_.from_group) * in_pixels_ + pixel,
          width * g.stride_width, in_pixels_, pass_.from_group);
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
    const int64_t taps = lines_of(*worker.phase), lines = pass_.from_group * taps,
                  filter = worker.group * pass_.to_group + m;
    const A* weights = packed_ + worker.group * pass_.to_group * pass_.from_group * pass_.shape.taps() +
                       worker.phase->weight_offset * pass_.from_group * pass_.to_group + m * lines + c * taps;
    // Sums are kept where more channels follow, and where the item's filters are stored together.
    const int64_t step = groups_at_once_ > 1 ? channel_step() * width : width;
    A* sums = worker.sums + (groups_at_once_ > 1 ? channel(worker.group, m) : m - worker.filter) * width;
    Vector<A> sum[R][V];
    const A* rows[R];
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      rows[r] = weights + r * lines;
      const Vector<A> bias = broadcast(epilogue_.bias ? A(load(epilogue_.bias[filter + r])) : A(0));
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] = c == 0 ? bias : load_vector(sums + r * step + v * L);
    }
    const int64_t count = (c_end - c) * taps;
    for (int64_t k = 0; k < count; k += ask_lines) {
      worker.next.ask();
      const A* values[R];
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) values[r] = rows[r] + k;
      multiply_add(sum, values, 1, worker.lines + k * worker.line_step, worker.line_step,
                   std::min(ask_lines, count - k));
    }
    if (channels_last_ || c_end < pass_.from_group) {
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) store_vector(sums + r * step + v * L, sum[r][v]);
      return;
    }
    if (store_in_place<R, V>(worker, m, sum)) return;
    A block[R][width];
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) store_vector(block[r] + v * L, sum[r][v]);
    for (int r = 0; r < R; ++r) store_plane(worker, m + r, block[r]);
  }

  // The usual case, a panel of consecutive pixels, straight from the registers; false, and nothing done,
  // where there is more to do.
  template <int R, int V>
  inline __attribute__((always_inline)) bool store_in_place(const Worker& worker, int64_t filter,
                                                            Vector<A> (&sum)[R][V]) const {
    if constexpr (std::is_same_v<T, A>) {
      const Phase& phase = *worker.phase;
      const Run &run = worker.runs.front(), &last = worker.runs.back();
      if (worker.pixels < V * L || run.image != last.image || phase.row_step > 1 || phase.column_step > 1 ||
          !is_floor(epilogue_.activation))
        return false;
      const int64_t at = (run.image * out_channels_ + channel(worker.group, filter)) * out_pixels_ +
                         run.row * pass_.geometry.out_width + run.column;
      const int64_t step = channel_step() * out_pixels_;
      const Vector<A> least = broadcast(floor_of<A>(epilogue_.activation));
      if (epilogue_.residual) {
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) sum[r][v] += load_vector(epilogue_.residual + at + r * step + v * L);
      }
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v)
          store_vector(output_ + at + r * step + v * L, sum[r][v] < least ? least : sum[r][v]);
      return true;
    }
    return false;
  }

  // Contiguous images: pixels of a filter, from the lanes to where they lie.
  void store_plane(const Worker& worker, int64_t filter, const A* sums) const {
    const Geometry& g = pass_.geometry;
    const Phase& phase = *worker.phase;
    for (int64_t k = 0; k < int64_t(worker.runs.size()); ++k) {
      const Run& run = worker.runs[k];
      const int64_t at = (run.image * out_channels_ + channel(worker.group, filter)) * out_pixels_ +
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

  // channels_last: the item's channels of L pixels at a time, transposed.
  void store_channels(const Worker& worker, int64_t group) const {
    const int64_t first = groups_at_once_ > 1 ? 0 : channel(group, worker.filter);
    const int64_t channels = groups_at_once_ > 1 ? out_channels_ : worker.filter_end - worker.filter;
    for (int64_t lane = 0; lane < worker.pixels; lane += L)
      for (int64_t k = 0; k < channels; k += L) {
        const int64_t at = std::max<int64_t>(0, std::min(k, channels - L));  // overlaps the block before
        A square[L][L];
        transpose_square<A>([&](int row) { return worker.sums + (at + row) * width + lane; },
                            [&](int column) { return square[column]; });
        for (int64_t pixel = 0; pixel < std::min(L, worker.pixels - lane); ++pixel)
          store_run(square[pixel], epilogue_, output_, worker.outputs[lane + pixel] + first + at, 1,
                    std::min(L, channels));
      }
  }

  const T* input_;
  const A* packed_;
  const Conv2dEpilogue<T>& epilogue_;
  T* output_;
  const Im2colPass& pass_;
  bool channels_last_;  // whether images are channels_last
  int64_t in_channels_, out_channels_, in_pixels_, out_pixels_;
  const T* input_end_;
  int64_t groups_at_once_;  // that an item computes: all whose channels are neighbours in a pixel
  int64_t group_sets_;      // of so many groups
  int64_t parts_;
  std::vector<std::vector<Offset>> offsets_;  // of each phase, whose taps they are, or of a shift
  std::vector<int64_t> sources_;              // of a shift: which offset each channel has
  std::vector<Panel> panels_;
};

}  // namespace fastconv::FASTCONV_CPU_CAPABILITY
