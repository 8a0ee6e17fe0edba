#include "plugin/qemu/memory_map.h"

#include <fcntl.h>
#include <sys/sysmacros.h>

#include <algorithm>
#include <cassert>
#include <cerrno>
#include <charconv>
#include <cinttypes>
#include <cstdio>
#include <fstream>
#include <map>

#include "plugin/qemu/process_files.h"

namespace qvmstate::qemu {
namespace {

constexpr uint64_t page_bytes = 4096;
// Read at a time. A thread that deals with every other MiB would have no use for more.
constexpr size_t pagemap_entries = 1024 * 1024 / page_bytes;
constexpr uint64_t pagemap_touched = uint64_t{3} << 62;  // present or swapped

/// Cuts a number off `text`, which `separator` must follow (and is cut off too).
std::optional<uint64_t> take_number(std::string_view &text, int base, char separator) {
  uint64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value, base);
  const size_t used = static_cast<size_t>(end - text.data());
  if (error != std::errc() || used >= text.size() || text[used] != separator) {
    return std::nullopt;
  }
  text.remove_prefix(used + 1);
  return value;
}

Result<std::vector<Mapping>> read_maps(pid_t pid) {
  const std::string path = "/proc/" + std::to_string(pid) + "/maps";
  std::ifstream file(path);
  if (!file) {
    return fail_errno(errno, "opening '" + path + "'; run as root or as QEMU's user");
  }
  std::vector<Mapping> mappings;
  for (std::string line; std::getline(file, line);) {
    if (auto mapping = parse_maps_line(line)) {
      mappings.push_back(*std::move(mapping));
    }
  }
  if (mappings.empty()) {
    return fail(ErrorCode::permission,
                "'" + path + "' is empty; run as root or as QEMU's user (who may trace it)");
  }
  return mappings;
}

/// Opens what a shared mapping maps: by its link in map_files (needs privilege), else by a
/// descriptor of the process for the same file.
Descriptor open_mapped_file(pid_t pid, const Mapping &mapping,
                            const std::vector<OpenFile> &open_files) {
  char link[96];
  std::snprintf(link, sizeof link, "/proc/%d/map_files/%" PRIx64 "-%" PRIx64, pid, mapping.start,
                mapping.end);
  Descriptor file(::open(link, O_RDONLY | O_CLOEXEC));
  if (file) {
    return file;
  }
  const dev_t device = makedev(static_cast<unsigned>(mapping.device_major),
                               static_cast<unsigned>(mapping.device_minor));
  for (const OpenFile &candidate : open_files) {
    if (candidate.inode == mapping.inode && candidate.device == device) {
      if (auto opened = reopen(pid, candidate.number, O_RDONLY, mapping.path)) {
        return std::move(*opened);
      }
    }
  }
  return Descriptor();
}

}  // namespace

std::optional<Mapping> parse_maps_line(std::string_view line) {
  Mapping mapping;
  const auto start = take_number(line, 16, '-');
  const auto end = start ? take_number(line, 16, ' ') : std::nullopt;
  if (!end || *end <= *start || line.size() < 5 || line[4] != ' ') {
    return std::nullopt;
  }
  mapping.start = *start;
  mapping.end = *end;
  mapping.shared = line[3] == 's';
  line.remove_prefix(5);
  const auto offset = take_number(line, 16, ' ');
  const auto major = offset ? take_number(line, 16, ':') : std::nullopt;
  const auto minor = major ? take_number(line, 16, ' ') : std::nullopt;
  const std::string rest = std::string(line) + ' ';
  std::string_view tail = rest;
  const auto inode = minor ? take_number(tail, 10, ' ') : std::nullopt;
  if (!inode) {
    return std::nullopt;
  }
  mapping.file_offset = *offset;
  mapping.device_major = *major;
  mapping.device_minor = *minor;
  mapping.inode = *inode;
  const size_t name = tail.find_first_not_of(' ');
  if (name != std::string_view::npos) {
    mapping.path = tail.substr(name, tail.size() - name - 1);
  }
  return mapping;
}

Result<MemoryMap> MemoryMap::read(pid_t pid, const std::vector<HostRamBlock> &blocks) {
  MemoryMap map;
  QV_ASSIGN(const std::vector<Mapping> mappings, read_maps(pid));
  QV_ASSIGN(const std::vector<OpenFile> files, open_files(pid));
  const std::string pagemap = "/proc/" + std::to_string(pid) + "/pagemap";
  map.pagemap_ = Descriptor(::open(pagemap.c_str(), O_RDONLY | O_CLOEXEC));
  if (!map.pagemap_) {
    return fail_errno(errno, "opening '" + pagemap + "'; run as root or as QEMU's user");
  }
  std::map<uint64_t, int> opened;  // by the start of the mapping
  for (const HostRamBlock &block : blocks) {
    assert(block.address);
    const bool huge = block.block.page_bytes > page_bytes;
    std::vector<Segment> segments;
    uint64_t done = 0;
    for (const Mapping &mapping : mappings) {
      const uint64_t address = *block.address + done;
      if (done == block.block.used_bytes || mapping.end <= address) {
        continue;
      }
      if (mapping.start > address) {
        break;
      }
      Segment segment;
      segment.start = done;
      segment.end = std::min(block.block.used_bytes, done + (mapping.end - address));
      segment.address = address;
      segment.file_offset = mapping.file_offset + (address - mapping.start);
      if (mapping.shared) {
        segment.kind = huge ? MemoryKind::shared_huge : MemoryKind::shared;
        const auto known = opened.find(mapping.start);
        if (known != opened.end()) {
          segment.file = known->second;
        } else if (Descriptor file = open_mapped_file(pid, mapping, files)) {
          segment.file = static_cast<int>(map.files_.size());
          map.files_.push_back(std::move(file));
          opened[mapping.start] = segment.file;
        } else {
          map.warnings_.push_back("RAM block '" + block.block.idstr +
                                  "' is shared memory that cannot be opened here: untouched pages "
                                  "of it are read, and take memory from then on");
        }
      } else if (huge) {
        // Only a file that holds pages itself has data that the pagemap does not know of.
        struct stat status;
        const Descriptor file = open_mapped_file(pid, mapping, files);
        const bool has_data = file && ::fstat(file.get(), &status) == 0 && status.st_blocks > 0;
        segment.kind = has_data ? MemoryKind::private_file : MemoryKind::private_huge;
      } else {
        segment.kind =
            mapping.inode != 0 ? MemoryKind::private_file : MemoryKind::private_anonymous;
      }
      done = segment.end;
      segments.push_back(segment);
    }
    if (done != block.block.used_bytes) {
      return fail(ErrorCode::not_found,
                  "RAM block '" + block.block.idstr + "' is not where QEMU says in process " +
                      std::to_string(pid) + "; does the QMP socket belong to another QEMU?");
    }
    map.block_bytes_.push_back(block.block.used_bytes);
    map.segments_.push_back(std::move(segments));
  }
  return map;
}

const Segment &MemoryMap::segment_at(size_t block, uint64_t offset) const {
  const std::vector<Segment> &segments = segments_[block];
  assert(offset < block_bytes_[block]);
  return *std::partition_point(segments.begin(), segments.end(),
                               [&](const Segment &segment) { return segment.end <= offset; });
}

bool MemoryMap::has_shared_huge_pages(size_t block) const {
  return std::any_of(segments_[block].begin(), segments_[block].end(), [](const Segment &segment) {
    return segment.kind == MemoryKind::shared_huge;
  });
}

Result<vmstate::RamSource::Presence> MemoryMap::presence(size_t block, uint64_t offset) {
  const Segment &segment = segment_at(block, offset);
  switch (segment.kind) {
    case MemoryKind::private_anonymous:
    case MemoryKind::private_huge:
      return pagemap_presence(segment, offset);
    case MemoryKind::shared:
      if (segment.file >= 0) {
        return file_presence(segment, offset);
      }
      break;
    case MemoryKind::private_file:
    case MemoryKind::shared_huge:
      break;
  }
  return vmstate::RamSource::Presence{true, segment.end - offset};
}

Result<vmstate::RamSource::Presence> MemoryMap::pagemap_presence(const Segment &segment,
                                                                 uint64_t offset) {
  const uint64_t first = (segment.address + offset - segment.start) / page_bytes;
  const uint64_t pages = (segment.end - offset) / page_bytes;
  if (first < entries_first_ || first >= entries_first_ + entries_.size()) {
    entries_.resize(std::min<uint64_t>(pagemap_entries, pages));
    const ssize_t bytes =
        ::pread(pagemap_.get(), entries_.data(), entries_.size() * sizeof(uint64_t),
                static_cast<off_t>(first * sizeof(uint64_t)));
    if (bytes < static_cast<ssize_t>(sizeof(uint64_t))) {
      const int error = bytes < 0 ? errno : ESRCH;
      entries_.clear();
      return fail_errno(error, "reading which pages of the guest's RAM were touched");
    }
    entries_.resize(static_cast<size_t>(bytes) / sizeof(uint64_t));
    entries_first_ = first;
  }
  const auto begin = entries_.begin() + static_cast<ptrdiff_t>(first - entries_first_);
  const auto end =
      begin + std::min<ptrdiff_t>(entries_.end() - begin, static_cast<ptrdiff_t>(pages));
  const bool touched = (*begin & pagemap_touched) != 0;
  const auto change = std::find_if(
      begin, end, [&](uint64_t entry) { return ((entry & pagemap_touched) != 0) != touched; });
  return vmstate::RamSource::Presence{touched, static_cast<uint64_t>(change - begin) * page_bytes};
}

Result<vmstate::RamSource::Presence> MemoryMap::file_presence(const Segment &segment,
                                                              uint64_t offset) {
  const uint64_t left = segment.end - offset;
  const off_t here = static_cast<off_t>(segment.file_offset + (offset - segment.start));
  const int file = files_[segment.file].get();
  const off_t data = ::lseek(file, here, SEEK_DATA);
  if (data < 0 && errno == ENXIO) {
    return vmstate::RamSource::Presence{false, left};
  }
  if (data < 0) {
    return vmstate::RamSource::Presence{true, left};  // the file system does not tell
  }
  // Holes and data may begin inside a page; a page with any data is read.
  const uint64_t hole_bytes = static_cast<uint64_t>(data - here) / page_bytes * page_bytes;
  if (hole_bytes > 0) {
    return vmstate::RamSource::Presence{false, std::min(left, hole_bytes)};
  }
  const off_t hole = ::lseek(file, data, SEEK_HOLE);
  const uint64_t data_bytes =
      hole < 0 ? left
               : (static_cast<uint64_t>(hole - here) + page_bytes - 1) / page_bytes * page_bytes;
  return vmstate::RamSource::Presence{true, std::min(left, std::max(data_bytes, page_bytes))};
}

Result<uint64_t> MemoryMap::touched_bytes() {
  uint64_t touched = 0;
  for (size_t block = 0; block < segments_.size(); ++block) {
    for (uint64_t offset = 0; offset < block_bytes_[block];) {
      QV_ASSIGN(const auto found, presence(block, offset));
      touched += found.touched ? found.bytes : 0;
      offset += found.bytes;
    }
  }
  return touched;
}

}  // namespace qvmstate::qemu
