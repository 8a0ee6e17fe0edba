#include "vmstate/compressed_copy.h"

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "qcow2/compression.h"
#include "qcow2/io/signals.h"
#include "vmstate/page_scan.h"

namespace qvmstate::vmstate {
namespace {

constexpr uint64_t batch_bytes_min = 128 * kib;
constexpr uint64_t batches_per_thread_min = 3;  // one in work, one before and one behind it
// More, where they are small: the threads go on while the one that reads and writes waits for it.
constexpr uint64_t ahead_bytes_per_thread = 1 * mib;

/// Clusters that one thread compresses at a time.
struct Batch {
  enum class Kind : uint8_t { zeros, plain, compressed };
  struct Cluster {
    Kind kind;
    size_t stored_bytes;
  };
  std::vector<std::byte> raw;
  std::vector<std::byte> stored;  ///< of each cluster, where its raw bytes are in `raw`
  std::vector<Cluster> clusters;
  bool is_done = false;
};

/// Hands batches to threads. Threads: one gives and waits, any number take.
class Workers {
 public:
  Workers(uint64_t cluster_bytes, bool has_zero_flag)
      : cluster_bytes_(cluster_bytes), has_zero_flag_(has_zero_flag) {}
  ~Workers() {
    {
      const std::lock_guard lock(mutex_);
      is_over_ = true;
    }
    given_.notify_all();
    for (std::thread &thread : threads_) {
      thread.join();
    }
  }

  Result<void> start(unsigned threads, uint8_t compression_type) {
    for (unsigned i = 0; i < threads; ++i) {
      QV_ASSIGN(auto compressor, qcow2::ClusterCompressor::create(compression_type));
      compressors_.push_back(std::move(compressor));
    }
    const io::SignalsBlocked blocked;
    try {
      for (const auto &compressor : compressors_) {
        threads_.emplace_back([this, &compressor] { work(*compressor); });
      }
    } catch (const std::system_error &error) {
      return fail(ErrorCode::io,
                  std::string("cannot start threads to compress: ") + error.what() +
                      "; use fewer --threads",
                  error.code().value());
    }
    return {};
  }

  void give(Batch &batch) {
    {
      const std::lock_guard lock(mutex_);
      batch.is_done = false;
      waiting_.push_back(&batch);
    }
    given_.notify_one();
  }
  void wait_for(const Batch &batch) {
    std::unique_lock lock(mutex_);
    done_.wait(lock, [&] { return batch.is_done; });
  }

 private:
  void work(qcow2::ClusterCompressor &compressor) {
    for (;;) {
      Batch *batch = nullptr;
      {
        std::unique_lock lock(mutex_);
        given_.wait(lock, [&] { return is_over_ || !waiting_.empty(); });
        if (is_over_) {
          return;
        }
        batch = waiting_.front();
        waiting_.pop_front();
      }
      compress(*batch, compressor);
      {
        const std::lock_guard lock(mutex_);
        batch->is_done = true;
      }
      done_.notify_one();
    }
  }

  void compress(Batch &batch, qcow2::ClusterCompressor &compressor) const {
    batch.clusters.clear();
    batch.stored.resize(batch.raw.size());
    for (uint64_t at = 0; at < batch.raw.size(); at += cluster_bytes_) {
      const auto raw = std::span(batch.raw).subspan(at, cluster_bytes_);
      if (has_zero_flag_ && is_zero(raw.data(), raw.size())) {
        batch.clusters.push_back({Batch::Kind::zeros, 0});
        continue;
      }
      const size_t stored =
          compressor.compress(raw, std::span(batch.stored).subspan(at, cluster_bytes_ - 1));
      batch.clusters.push_back(
          {stored == 0 ? Batch::Kind::plain : Batch::Kind::compressed, stored});
    }
  }

  const uint64_t cluster_bytes_;
  const bool has_zero_flag_;
  std::vector<std::unique_ptr<qcow2::ClusterCompressor>> compressors_;
  std::mutex mutex_;
  std::condition_variable given_;
  std::condition_variable done_;
  std::deque<Batch *> waiting_;
  bool is_over_ = false;
  std::vector<std::thread> threads_;
};

Result<void> put(const Batch &batch, uint64_t cluster_bytes, qcow2::CompressedArea &area) {
  uint64_t at = 0;
  for (const Batch::Cluster &cluster : batch.clusters) {
    switch (cluster.kind) {
      case Batch::Kind::zeros:
        QV_TRY(area.add_zeros());
        break;
      case Batch::Kind::plain:
        QV_TRY(area.add_plain(std::span(batch.raw).subspan(at, cluster_bytes)));
        break;
      case Batch::Kind::compressed:
        QV_TRY(area.add_compressed(std::span(batch.stored).subspan(at, cluster.stored_bytes)));
        break;
    }
    at += cluster_bytes;
  }
  return {};
}

}  // namespace

Result<CompressedCopy> copy_compressed(StreamSource &source, uint64_t bytes,
                                       const qcow2::Header &header, qcow2::CompressedArea &area,
                                       unsigned threads, const TransferHook &hook) {
  const uint64_t cluster_bytes = header.geometry.cluster_bytes();
  const uint64_t batch_bytes = std::max(cluster_bytes, batch_bytes_min);
  std::vector<Batch> ring(  // outlives the threads
      threads * std::max(batches_per_thread_min, ahead_bytes_per_thread / batch_bytes));
  Workers workers(cluster_bytes, header.version >= 3);
  QV_TRY(workers.start(threads, header.compression_type));

  StreamDigest digest;
  const uint64_t batches = divide_up(bytes, batch_bytes);
  uint64_t given = 0;
  for (uint64_t put_next = 0; put_next < batches; ++put_next) {
    for (; given < std::min(batches, put_next + ring.size()); ++given) {
      QV_TRY(hook());
      Batch &batch = ring[given % ring.size()];
      const uint64_t at = given * batch_bytes;
      const uint64_t part = std::min(batch_bytes, bytes - at);
      batch.raw.assign(round_up(part, cluster_bytes), std::byte{0});
      QV_TRY(source.read(StreamOffset(at), std::span(batch.raw).first(part)));
      digest.add(std::span(batch.raw).first(part));
      workers.give(batch);
    }
    const Batch &batch = ring[put_next % ring.size()];
    workers.wait_for(batch);
    QV_TRY(put(batch, cluster_bytes, area));
  }
  QV_TRY(area.finish());
  return CompressedCopy{digest.finish(), area.stored_bytes()};
}

}  // namespace qvmstate::vmstate
