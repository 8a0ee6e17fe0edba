#include "plugin/abi/load.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <utility>

#include "vmstate/channel_count.h"
#include "vmstate/mapped_ram_reader.h"
#include "vmstate/page_scan.h"
#include "vmstate/read_ahead_source.h"

namespace qvmstate::abi {
namespace {

constexpr uint32_t load_flags = QVMSTATE_LOAD_SKIP_UNKNOWN;
constexpr unsigned transfers_max = 8;

Outcome<void> check_options(const qvmstate_load_options &options) {
  if ((options.flags & ~load_flags) != 0) {
    return refuse(QVMSTATE_BAD_ARGUMENT, "load_begin: unknown flags; use QVMSTATE_LOAD_*");
  }
  if (options.name == nullptr && options.id == nullptr) {
    return refuse(QVMSTATE_BAD_ARGUMENT, "load_begin: neither name nor id of a snapshot is set");
  }
  if (options.threads > vmstate::mapped_channels_max) {
    return refuse(QVMSTATE_BAD_ARGUMENT, "load_begin: threads are more than 64");
  }
  return {};
}

Outcome<const qcow2::Snapshot *> find(Session &session, const qvmstate_load_options &options) {
  for (const qcow2::Snapshot &snapshot : session.image().snapshots()) {
    if ((options.name != nullptr && snapshot.name != options.name) ||
        (options.id != nullptr && snapshot.id != options.id)) {
      continue;
    }
    if (snapshot.vmstate_bytes == 0) {
      return refuse(QVMSTATE_NOT_FOUND, session.name() + ": snapshot '" + snapshot.name +
                                            "' has no VM state, only that of the disk");
    }
    return &snapshot;
  }
  std::string wanted = options.name == nullptr ? "" : " named '" + std::string(options.name) + "'";
  wanted += options.id == nullptr ? "" : " with id '" + std::string(options.id) + "'";
  return refuse(QVMSTATE_NOT_FOUND, session.name() + ": has no snapshot" + wanted);
}

}  // namespace

Load::Load(Session &session, const qvmstate_load_options &options, const qcow2::Snapshot &snapshot)
    : session_(session),
      snapshot_(snapshot),
      skip_unknown_((options.flags & QVMSTATE_LOAD_SKIP_UNKNOWN) != 0),
      threads_(options.threads),
      pace_("loading", options.progress, options.progress_user) {}

Outcome<std::unique_ptr<Load>> Load::begin(Session &session, const qvmstate_load_options &options) {
  QV_TRY(check_options(options));
  QV_ASSIGN(const qcow2::Snapshot *snapshot, find(session, options));
  std::unique_ptr<Load> load(new Load(session, options, *snapshot));
  QV_TRY(load->read_head(options));
  return load;
}

/// Of a mapped-ram stream all but the RAM. A legacy one tells its devices behind the RAM.
Outcome<void> Load::read_head(const qvmstate_load_options &options) {
  QV_ASSIGN(auto file, session_.another_file(transfers_max));
  QV_ASSIGN(source_, vmstate::SnapshotSource::over(std::move(file), snapshot_));
  bool is_legacy = false;
  auto whole = vmstate::read_stream(
      *source_, {}, {}, [&](const vmstate::StreamSummary &head) -> Result<void> {
        is_legacy = head.layout == vmstate::Layout::legacy;
        if (is_legacy) {
          stream_ = head;
          return qvmstate::fail(ErrorCode::cancelled, "the head is enough");
        }
        return {};
      });
  if (!is_legacy) {
    QV_ASSIGN(stream_, std::move(whole));
  }
  if (options.machine != nullptr && stream_.machine_type != options.machine) {
    return refuse(QVMSTATE_MISMATCH, session_.name() + ": snapshot '" + snapshot_.name +
                                         "' is of machine '" + stream_.machine_type + "', not '" +
                                         options.machine + "'");
  }
  places_.resize(stream_.blocks.size());
  return {};
}

tl::unexpected<Failure> Load::fail(Failure failure) {
  if (!failure_) {
    failure_ = std::move(failure);
  }
  return tl::unexpected(*failure_);
}

qvmstate_load_info Load::info() const {
  qvmstate_load_info info = {};
  info.layout = is_mapped() ? QVMSTATE_LAYOUT_MAPPED_RAM : QVMSTATE_LAYOUT_LEGACY;
  info.machine = stream_.machine_type.c_str();
  info.guest_page_bytes = stream_.page_bytes;
  info.block_count = stream_.blocks.size();
  for (const vmstate::StreamBlock &block : stream_.blocks) {
    info.ram_bytes += block.used_bytes;
  }
  return info;
}

Outcome<qvmstate_block_info> Load::block_info(uint64_t index) const {
  if (index >= stream_.blocks.size()) {
    return refuse(QVMSTATE_BAD_ARGUMENT, "load_block_info: there are only " +
                                             std::to_string(stream_.blocks.size()) + " RAM blocks");
  }
  qvmstate_block_info info = {};
  info.name = stream_.blocks[index].idstr.c_str();
  info.bytes = stream_.blocks[index].used_bytes;
  return info;
}

std::optional<size_t> Load::index_of(const std::string &block) const {
  const auto found = std::ranges::find(stream_.blocks, block, &vmstate::StreamBlock::idstr);
  if (found == stream_.blocks.end()) {
    return std::nullopt;
  }
  return static_cast<size_t>(found - stream_.blocks.begin());
}

Outcome<void> Load::add_ram(const qvmstate_ram_block &block) {
  if (failure_) {
    return tl::unexpected(*failure_);
  }
  if (ram_read_) {
    return refuse(QVMSTATE_BAD_STATE, "load_add_ram: RAM was read already");
  }
  QV_ASSIGN(HostBlock taken, take_block(block, 1, blocks_));
  const std::optional<size_t> index = index_of(taken.name);
  const std::string where = session_.name() + ": snapshot '" + snapshot_.name + "': ";
  if (!index) {
    return refuse(QVMSTATE_MISMATCH, where + "has no RAM block '" + taken.name + "'");
  }
  if (const uint64_t bytes = stream_.blocks[*index].used_bytes; bytes != taken.bytes) {
    return refuse(QVMSTATE_MISMATCH, where + "RAM block '" + taken.name + "' has " +
                                         std::to_string(bytes) + " bytes, the host's " +
                                         std::to_string(taken.bytes));
  }
  places_[*index] = taken.address;
  blocks_.push_back(std::move(taken));
  return {};
}

Outcome<void> Load::read_ram() {
  if (failure_) {
    return tl::unexpected(*failure_);
  }
  if (ram_read_) {
    return refuse(QVMSTATE_BAD_STATE, "load_ram: RAM was read already");
  }
  const auto missing = std::ranges::find(places_, nullptr);
  if (missing != places_.end()) {
    const size_t index = static_cast<size_t>(missing - places_.begin());
    return refuse(QVMSTATE_MISMATCH, session_.name() + ": snapshot '" + snapshot_.name +
                                         "' has a RAM block '" + stream_.blocks[index].idstr +
                                         "', which the host did not add");
  }
  pace_.begin(info().ram_bytes);
  if (auto read = is_mapped() ? read_mapped_ram() : read_legacy_ram(); !read) {
    return fail(with_context(std::move(read).error(),
                             session_.name() + ": snapshot '" + snapshot_.name + "'"));
  }
  ram_read_ = true;
  return {};
}

/// Memory that is zero already is only looked at: it may never have been touched.
void Load::fill(size_t block, uint64_t offset, uint64_t bytes,
                std::span<const std::byte> data) const {
  std::byte *const to = places_[block] + offset;
  if (!data.empty()) {
    std::memcpy(to, data.data(), data.size());
    return;
  }
  for (uint64_t done = 0; done < bytes; done += stream_.page_bytes) {
    const uint64_t part = std::min(stream_.page_bytes, bytes - done);
    if (!vmstate::is_zero(to + done, part)) {
      std::memset(to + done, 0, part);
    }
  }
}

Result<void> Load::read_legacy_ram() {
  uint64_t done = 0;
  const auto hook = [&](size_t block, uint64_t offset, uint64_t page_bytes,
                        std::span<const std::byte> data) -> Result<void> {
    fill(block, offset, page_bytes, data);
    done += page_bytes;
    return done % mib == 0 ? pace_.follow(done) : Result<void>();
  };
  // Somebody who does not care for locks may have written to the image meanwhile.
  const auto check_blocks = [&](const vmstate::StreamSummary &head) -> Result<void> {
    const bool same =
        std::ranges::equal(head.blocks, stream_.blocks, [](const auto &a, const auto &b) {
          return a.idstr == b.idstr && a.used_bytes == b.used_bytes;
        });
    return same ? Result<void>()
                : qvmstate::fail(ErrorCode::bad_stream, "its RAM blocks changed while it was open");
  };
  QV_ASSIGN(source_, vmstate::ReadAheadSource::create(std::move(source_)));
  QV_ASSIGN(stream_, vmstate::read_stream(*source_, hook, {}, check_blocks));
  return pace_.follow(done);
}

Result<void> Load::read_mapped_ram() {
  std::mutex mutex;
  uint64_t done = 0;
  const auto hook = [&](size_t, size_t block, uint64_t offset, std::span<const std::byte> data,
                        uint64_t bytes) -> Result<void> {
    fill(block, offset, bytes, data);
    const std::lock_guard lock(mutex);
    done += bytes;
    return pace_.follow(done);
  };
  const auto open_source = [&]() -> Result<std::unique_ptr<vmstate::StreamSource>> {
    QV_ASSIGN(auto file, session_.another_file(transfers_max));
    QV_ASSIGN(auto source, vmstate::SnapshotSource::over(std::move(file), snapshot_));
    return std::unique_ptr<vmstate::StreamSource>(std::move(source));
  };
  vmstate::MappedReadOptions options;
  options.channels = threads_ != 0 ? threads_ : vmstate::default_channels(info().ram_bytes);
  options.cancelled = &pace_.cancelled();
  return vmstate::read_mapped_ram(stream_, open_source, hook, options);
}

Outcome<void> Load::read_sections(qvmstate_section_read_fn read, void *user) {
  if (failure_) {
    return tl::unexpected(*failure_);
  }
  if (!ram_read_) {
    return refuse(QVMSTATE_BAD_STATE, "load_sections: RAM comes first; call load_ram");
  }
  if (read == nullptr) {
    return refuse(QVMSTATE_BAD_ARGUMENT, "load_sections: read is NULL");
  }
  std::string unknown;
  std::vector<std::byte> bytes;
  for (const vmstate::StreamSection &section : stream_.devices) {
    if (auto proceed = pace_.check(); !proceed) {
      return fail(std::move(proceed).error());
    }
    bytes.resize(section.bytes);
    if (auto got = source_->read(StreamOffset(section.offset), bytes); !got) {
      return fail(std::move(got).error());
    }
    const qvmstate_section given = {sizeof given,          section.instance, section.version, 0,
                                    section.idstr.c_str(), bytes.data(),     bytes.size()};
    const int answer = read(user, &given);
    if (answer == QVMSTATE_SECTION_UNKNOWN) {
      unknown += (unknown.empty() ? "'" : ", '") + section.idstr + "' (instance " +
                 std::to_string(section.instance) + ", version " + std::to_string(section.version) +
                 ")";
    } else if (answer != 0) {
      return fail({QVMSTATE_CALLBACK,
                   "device section '" + section.idstr + "': the host's callback returned " +
                       std::to_string(answer),
                   answer});
    }
  }
  if (unknown.empty()) {
    return {};
  }
  const std::string line = session_.name() + ": snapshot '" + snapshot_.name +
                           "' has device sections that the host does not know: " + unknown;
  if (skip_unknown_) {
    session_.log(QVMSTATE_LOG_WARNING, line);
    return {};
  }
  return refuse(QVMSTATE_MISMATCH, line);
}

}  // namespace qvmstate::abi
