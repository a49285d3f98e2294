// The grouped convolution, forward and transposed: from images to strips of rows and units of channels.
//
// Channels_last float32 pixels of up to 1 KiB are read where they lie, and all units take turns on a few
// columns; any other image goes through a tile, a unit at a time. What comes next is asked for meanwhile.
#pragma once

#include "../depthwise_conv2d/depthwise_conv2d_vectorized_cpu.h"
#include "conv2d_grouped_columns_cpu.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {
namespace {

// Packed weights: (units, out_vectors, phases' taps_high, in_group, taps_wide, L), zero in lanes that are no
// channel. weight_at(m, c): the taps of output channel m and channel c of its group.
template <typename T, typename WeightAt>
void pack_grouped(const GroupedChannels<accumulate_t<T>>& channels, const Geometry& g,
                  const WeightAt& weight_at, accumulate_t<T>* packed, ParallelFor threads) {
  using A = accumulate_t<T>;
  constexpr int64_t L = lanes_of<A>;
  const int64_t vectors = channels.out_vectors(), terms = channels.in_group;
  const int64_t block_size = int64_t(g.taps.size()) * terms * L;
  parallel_for(threads, channels.units() * vectors, [&](int64_t begin, int64_t end) {
    const T* filters[L];
    for (int64_t block = begin; block < end; ++block) {
      const Range lanes = channels.out_channels(block / vectors, block % vectors);
      const int64_t count = lanes.end - lanes.begin;
      for (int64_t c = 0; c < terms; ++c) {
        for (int64_t lane = 0; lane < L; ++lane)
          filters[lane] = weight_at(lanes.begin + std::min(lane, count - 1), c);
        for (const Phase& phase : g.phases)
          for (int64_t i = 0; i < phase.taps_high; ++i)
            for (int64_t j = 0; j < phase.taps_wide; ++j) {
              const int64_t tap = g.taps[phase.weight_offset + i * phase.taps_wide + j];
              A* target = packed + block * block_size +
                          (phase.weight_offset * terms + (i * terms + c) * phase.taps_wide + j) * L;
              for (int64_t lane = 0; lane < L; ++lane) target[lane] = load(filters[lane][tap]);
              std::fill(target + count, target + L, A(0));
            }
      }
    }
  });
}

template <typename T>
class GroupedConvolution {
 public:
  using A = accumulate_t<T>;
  static constexpr int64_t L = lanes_of<A>;

  GroupedConvolution(const T* input, const A* packed, const Conv2dEpilogue<T>& epilogue, T* output,
                     const GroupedChannels<A>& channels, int64_t batch, bool channels_last, Geometry geometry)
      : geometry_(std::move(geometry)),
        channels_(channels),
        input_{input, channels.groups * channels.in_group, geometry_.in_height, geometry_.in_width,
               channels_last},
        output_{output, channels.groups * channels.out_group, geometry_.out_height, geometry_.out_width,
                channels_last},
        residual_{epilogue.residual, output_.channels, output_.height, output_.width, channels_last},
        packed_(packed),
        epilogue_(epilogue),
        batch_(batch) {
    const Geometry& g = geometry_;
    writes_in_place_ = std::is_same_v<T, A> && channels_last && channels.fills_vectors();
    reads_in_place_ = writes_in_place_ && channels.reads_in_place();
    streams_ = writes_in_place_ && stores_past_caches(output_, batch, output_.channels);
    columns_ = phase_columns(g, g.phases[0]);  // no phase has more
    pixels_ = pixels_at_once(columns_);
    for (const Phase& phase : g.phases)
      kernels_.push_back(pixels_ == 7 ? choose_kernel<7>(phase) : choose_kernel<8>(phase));
    if (channels.permutes())
      for (int64_t c = 0; c < channels.in_group; ++c) spreads_.push_back(channels.spread(c));
    // In place, all units take turns; else an item is one of them.
    turns_ = reads_in_place_ ? channels.units() : 1;
    // Strips of rows: as many as the L2 cache holds, but enough strips for every thread.
    const int64_t row_step = g.phases[0].row_step;
    const int64_t row_bytes = int64_t(sizeof(A)) * L * turns_ *
                              (g.out_width + channels_.in_vectors() * g.in_width *
                                                 std::max<int64_t>(g.in_height / g.out_height, 1));
    strip_rows_ = std::clamp<int64_t>((reads_in_place_ ? 384 << 10 : 192 << 10) / row_bytes, 1, g.out_height);
    const int64_t items = batch_ * channels_.units() / turns_;
    if (items < 64) strip_rows_ = std::min(strip_rows_, std::max<int64_t>(g.out_height * items / 64, 4));
    strip_rows_ = std::min(ceil_div(strip_rows_, 2 * row_step) * 2 * row_step, g.out_height);
    strips_ = ceil_div(g.out_height, strip_rows_);
  }

  void run(ParallelFor threads) const {
    const int64_t items = channels_.units() / turns_ * strips_ * batch_;
    parallel_for(threads, items, [&](int64_t begin, int64_t end) {
      Worker worker(*this);
      for (int64_t k = begin; k < end; ++k) {
        const Item next = item(k + 1);
        compute(worker, item(k), k + 1 < end ? &next : nullptr);
      }
      if (streams_) stream_fence();
    });
  }

 private:
  // What one thread needs.
  struct Worker {
    explicit Worker(const GroupedConvolution& of)
        : in_tile_size(of.reads_in_place_
                           ? 0
                           : most_input_rows(of.geometry_, of.strip_rows_) * of.geometry_.in_width * L),
          out_tile_size(of.writes_in_place_ ? 0 : of.strip_rows_ * of.geometry_.out_width * L),
          in_tiles(in_tile_size * of.channels_.in_vectors()),
          out_tile(out_tile_size),
          residual_tile(of.epilogue_.residual ? out_tile_size : 0) {}
    int64_t in_tile_size, out_tile_size;
    Scratch<A> in_tiles, out_tile, residual_tile;
    std::vector<GroupedStrip<A>> strips;
    PrefetchRuns next;
  };

  // Rows [row_begin, row_end) of a unit, or of all of them; row_begin is a multiple of the phases' step.
  struct Item {
    int64_t unit, image, row_begin, row_end;
  };
  Item item(int64_t k) const {
    const int64_t units = channels_.units() / turns_, row = k / units % strips_ * strip_rows_;
    return {k % units, k / units / strips_, row, std::min(row + strip_rows_, geometry_.out_height)};
  }

  template <int P>
  GroupedKernel<A> choose_kernel(const Phase& phase) const {
    if constexpr (vector_bytes >= 32)
      if (channels_.permutes()) return choose_grouped_kernel<true, P, A>(geometry_, phase);
    return choose_grouped_kernel<false, P, A>(geometry_, phase);
  }

  // Output vector v of a unit, as if the input and the output were read and written in place.
  GroupedStrip<A> strip_of(Worker& worker, const Item& item, int64_t unit, int64_t v) const {
    GroupedStrip<A> strip{};
    strip.terms = channels_.in_group;
    strip.spread = spreads_.data();
    strip.geometry = &geometry_;
    strip.taps = packed_ + (unit * channels_.out_vectors() + v) * int64_t(geometry_.taps.size()) *
                               channels_.in_group * L;
    strip.streams = streams_;
    strip.activation = epilogue_.activation;
    strip.next = &worker.next;
    const Range lanes = channels_.out_channels(unit, v);
    for (int64_t lane = 0; lane < L; ++lane)
      strip.bias[lane] =
          epilogue_.bias && lanes.begin + lane < lanes.end ? load(epilogue_.bias[lanes.begin + lane]) : A(0);
    if constexpr (std::is_same_v<T, A>) {
      strip.input = input_.next(item.image).block(lanes.begin);
      strip.output = output_.next(item.image).block(lanes.begin);
      if (epilogue_.residual) strip.residual = residual_.next(item.image).block(lanes.begin);
    }
    return strip;
  }

  void compute(Worker& worker, const Item& item, const Item* next) const {
    const Geometry& g = geometry_;
    worker.strips.clear();
    if (reads_in_place_) {
      for (int64_t unit = 0; unit < turns_; ++unit) worker.strips.push_back(strip_of(worker, item, unit, 0));
      return compute_rows(worker, item.row_begin, item.row_end, item.image);
    }
    const auto [low, high] = input_rows(g, item.row_begin, item.row_end);
    for (int64_t v = 0; v < channels_.in_vectors(); ++v) {
      const Range lanes = channels_.in_channels(item.unit, v);
      load_tile(input_.next(item.image), Lanes{lanes.begin}, lanes.end - lanes.begin, low, high,
                worker.in_tiles.data() + v * worker.in_tile_size);
    }
    prefetch_item(worker.next, next);
    for (int64_t v = 0; v < channels_.out_vectors(); ++v) {
      const Range lanes = channels_.out_channels(item.unit, v);
      const int64_t count = lanes.end - lanes.begin;
      GroupedStrip<A> strip = strip_of(worker, item, item.unit, v);
      strip.input = tile_block<const A>(worker.in_tiles.data(), low, g.in_width);
      strip.vector_stride = worker.in_tile_size;
      if (!writes_in_place_) {
        strip.output = tile_block(worker.out_tile.data(), item.row_begin, g.out_width);
        if (epilogue_.residual) {
          load_tile(residual_.next(item.image), Lanes{lanes.begin}, count, item.row_begin, item.row_end,
                    worker.residual_tile.data());
          strip.residual = tile_block<const A>(worker.residual_tile.data(), item.row_begin, g.out_width);
        }
      }
      worker.strips.assign(1, strip);
      compute_rows(worker, item.row_begin, item.row_end, item.image);
      if (!writes_in_place_)
        store_tile<T, A>(output_.next(item.image), Lanes{lanes.begin}, count, item.row_begin, item.row_end,
                         worker.out_tile.data());
    }
  }

  void compute_rows(Worker& worker, int64_t row_begin, int64_t row_end, int64_t image) const {
    const Geometry& g = geometry_;
    const int64_t row_step = g.phases[0].row_step;
    // In place, the units take turns on a few columns, so that memory is read in the order in which it lies.
    const int64_t columns_at_once = reads_in_place_ ? pixels_ : columns_;
    for (int64_t row = row_begin / row_step; row * row_step < row_end; row += 2)
      for (int64_t column = 0; column < columns_; column += columns_at_once) {
        if (reads_in_place_) {
          const bool row_ends = column + columns_at_once >= columns_;
          prefetch_columns(worker.next, image, row_ends ? row + 2 : row,
                           row_ends ? 0 : column + columns_at_once, columns_at_once);
        }
        for (size_t k = 0; k < g.phases.size(); ++k) {
          const Phase& phase = g.phases[k];
          const int64_t column_end = std::min(column + columns_at_once, phase_columns(g, phase));
          const int64_t rows_left = ceil_div(row_end - phase.first_row, row_step) - row;
          for (GroupedStrip<A>& strip : worker.strips) {
            strip.phase = &phase;
            if (rows_left >= 2 && kernels_[k].two_rows) {
              kernels_[k].two_rows(strip, row, column, column_end);
            } else {
              for (int64_t q = 0; q < std::min<int64_t>(rows_left, 2); ++q)
                kernels_[k].one_row(strip, row + q, column, column_end);
            }
          }
        }
      }
  }

  // How often the kernels ask for memory in some rows of the phases: for each row of the input they meet.
  int64_t asks(int64_t rows, int64_t columns) const {
    int64_t count = 0;
    for (size_t k = 0; k < kernels_.size(); ++k) {
      const int64_t taps = geometry_.phases[k].taps_high;
      count += kernels_[k].two_rows ? taps + geometry_.stride_height : 2 * taps;
    }
    return count * ceil_div(rows, 2) * ceil_div(columns, pixels_);
  }

  // Asks for what two rows of a few columns are the first to read, and for these outputs.
  void prefetch_columns(PrefetchRuns& next, int64_t image, int64_t row, int64_t column, int64_t count) const {
    const Geometry& g = geometry_;
    const Phase& phase = g.phases[0];
    next.clear(asks(2, count) * turns_);
    const auto add = [&](const auto& of, int64_t top, int64_t bottom, int64_t step) {
      top = std::clamp<int64_t>(top, 0, of.height);
      const int64_t begin = std::min(column * step, of.width), end = std::min(begin + count * step, of.width);
      next.add(of.data + top * of.row_stride() + begin * of.channels, (end - begin) * of.channels,
               of.row_stride(), std::min(bottom, of.height) - top);
    };
    const int64_t reach = (phase.taps_high - 1) * phase.dilation_height - phase.top;
    const int64_t top = (row - 1) * g.stride_height + 1 + reach;
    add(input_.next(image), top, top + 2 * g.stride_height, g.stride_width);
    if (!streams_)
      add(output_.next(image), row * phase.row_step, (row + 2) * phase.row_step, phase.column_step);
    if (epilogue_.residual)
      add(residual_.next(image), row * phase.row_step, (row + 2) * phase.row_step, phase.column_step);
  }

  // Asks for what an item reads and writes.
  void prefetch_item(PrefetchRuns& next, const Item* item) const {
    const Geometry& g = geometry_;
    if (!item) return next.clear(0);
    next.clear(asks(ceil_div(item->row_end - item->row_begin, g.phases[0].row_step), columns_) *
               channels_.out_vectors());
    const auto [low, high] = input_rows(g, item->row_begin, item->row_end);
    next.add(input_.next(item->image), channels_.in_channels(item->unit, 0).begin,
             channels_.in_channels(item->unit, channels_.in_vectors() - 1).end, low, high);
    if (streams_) return;
    next.add(output_.next(item->image), channels_.out_channels(item->unit, 0).begin,
             channels_.out_channels(item->unit, channels_.out_vectors() - 1).end, item->row_begin,
             item->row_end);
  }

  Geometry geometry_;
  GroupedChannels<A> channels_;
  Image<const T> input_;
  Image<T> output_;
  Image<const T> residual_;
  const A* packed_;
  Conv2dEpilogue<T> epilogue_;
  int64_t batch_;
  bool reads_in_place_, writes_in_place_, streams_;
  int64_t columns_, pixels_, turns_, strip_rows_, strips_;
  std::vector<GroupedKernel<A>> kernels_;
  std::vector<LaneIndex<A>> spreads_;
};

}  // namespace
}  // namespace fastconv::FASTCONV_CPU_CAPABILITY
