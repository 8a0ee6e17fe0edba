#include "vmstate/state_check.h"

#include <algorithm>
#include <bit>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "vmstate/read_ahead_source.h"

namespace qvmstate::vmstate {
namespace {

using qcow2::FindingKind;

/// Hashes what is read for the first time, and what is passed over, up to a limit.
class HashingSource : public StreamSource {
 public:
  HashingSource(std::unique_ptr<StreamSource> source, uint64_t limit, uint64_t piece_bytes)
      : source_(std::move(source)), limit_(limit), digest_(piece_bytes) {}

  Result<void> read(StreamOffset offset, std::span<std::byte> to) override {
    QV_TRY(pass_over(offset.value));
    QV_TRY(source_->read(offset, to));
    const uint64_t end = std::min(limit_, offset.value + to.size());
    if (end > digest_.bytes()) {
      digest_.add(to.subspan(digest_.bytes() - offset.value, end - digest_.bytes()));
    }
    return {};
  }
  uint64_t bytes_max() const override { return source_->bytes_max(); }
  Result<StreamRun> run_at(StreamOffset offset, uint64_t bytes) override {
    return source_->run_at(offset, bytes);
  }

  Result<StateChecksum> finish() {
    QV_TRY(pass_over(limit_));
    return digest_.finish();
  }

 private:
  Result<void> pass_over(uint64_t offset) {
    const uint64_t end = std::min(limit_, offset);
    while (digest_.bytes() < end) {
      const StreamOffset at(digest_.bytes());
      QV_ASSIGN(const StreamRun run, source_->run_at(at, end - at.value));
      if (run.kind == StreamRun::Kind::zeros) {
        digest_.add_zeros(run.bytes);
        continue;
      }
      piece_.resize(std::min(checksum_piece_bytes, end - at.value));
      QV_TRY(source_->read(at, piece_));
      digest_.add(piece_);
    }
    return {};
  }

  std::unique_ptr<StreamSource> source_;
  uint64_t limit_;
  StreamDigest digest_;
  std::vector<std::byte> piece_;
};

/// Which pages of a legacy stream's blocks had a record.
class Coverage {
 public:
  void begin(const StreamSummary &stream) {
    for (const StreamBlock &block : stream.blocks) {
      seen_.emplace_back(divide_up(block.used_bytes / stream.page_bytes, 64));
    }
  }
  void note(size_t block, uint64_t page) { seen_[block][page / 64] |= uint64_t{1} << page % 64; }
  uint64_t missing(size_t block, uint64_t pages) const {
    for (const uint64_t word : seen_[block]) {
      pages -= static_cast<uint64_t>(std::popcount(word));
    }
    return pages;
  }

 private:
  std::vector<std::vector<uint64_t>> seen_;
};

Result<std::optional<StreamSummary>> check_structure(StreamSource &source, const std::string &what,
                                                     qcow2::Findings &findings) {
  Coverage coverage;
  bool is_legacy = true;
  StreamHooks hooks;
  hooks.page = [&](size_t block, uint64_t offset, uint64_t page_bytes, std::span<const std::byte>) {
    if (is_legacy) {
      coverage.note(block, offset / page_bytes);
    }
    return Result<void>();
  };
  hooks.blocks = [&](const StreamSummary &so_far) -> Result<void> {
    is_legacy = so_far.layout == Layout::legacy;
    QV_TRY(check_room_for_pages(so_far, source.bytes_max()));
    if (is_legacy) {
      coverage.begin(so_far);
    }
    return {};
  };
  // What a page held before does not matter for its being there.
  hooks.page_now = [](size_t, uint64_t, std::span<std::byte>) { return Result<void>(); };
  const auto stream = read_stream(source, {}, hooks);
  if (!stream) {
    const Error &error = stream.error();
    if (error.code == ErrorCode::bad_stream || error.code == ErrorCode::bad_image) {
      findings.add(FindingKind::damage, what + ": " + error.message);
      return std::optional<StreamSummary>();
    }
    if (error.code == ErrorCode::not_supported) {
      findings.add(FindingKind::note, what + ": its structure was not checked: " + error.message);
      return std::optional<StreamSummary>();
    }
    return tl::unexpected(error);
  }
  for (size_t i = 0; is_legacy && i < stream->blocks.size(); ++i) {
    const StreamBlock &block = stream->blocks[i];
    const uint64_t missing = coverage.missing(i, block.used_bytes / stream->page_bytes);
    if (missing > 0) {
      findings.add(FindingKind::damage,
                   what + ": RAM block '" + block.idstr + "': " + std::to_string(missing) +
                       " pages have no record: a VM that loads the state keeps what it had there");
    }
  }
  return std::optional(*stream);
}

}  // namespace

Result<StateCheck> check_state(const SourceOpener &open_source,
                               const std::optional<StateChecksum> &expected,
                               const std::string &what, qcow2::Findings &findings) {
  QV_ASSIGN(std::unique_ptr<StreamSource> opened, open_source());
  QV_ASSIGN(auto ahead, ReadAheadSource::create(std::move(opened)));
  StateCheck check;
  if (!expected) {
    QV_ASSIGN(check.stream, check_structure(*ahead, what, findings));
    return check;
  }
  const uint64_t bytes_max = ahead->bytes_max();
  HashingSource hashing(std::move(ahead), std::min(expected->stream_bytes, bytes_max),
                        expected->piece_bytes);
  QV_ASSIGN(check.stream, check_structure(hashing, what, findings));
  auto found = hashing.finish();
  if (!found && found.error().code != ErrorCode::bad_image) {
    return tl::unexpected(std::move(found).error());
  }
  const bool right =
      found && found->stream_bytes == expected->stream_bytes && found->digest == expected->digest;
  check.checksum = right ? ChecksumResult::right : ChecksumResult::wrong;
  if (!right) {
    findings.add(FindingKind::damage,
                 what + ": does not have the checksum that it was saved with: " +
                     (found ? "some of its bytes are others now" : found.error().message));
  }
  return check;
}

}  // namespace qvmstate::vmstate
