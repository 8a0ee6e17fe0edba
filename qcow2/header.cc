#include "qcow2/header.h"

#include <algorithm>

#include "qcow2/limits.h"

namespace qvmstate::qcow2 {
namespace {

constexpr uint32_t version_2_header_bytes = 72;
constexpr uint32_t version_3_header_bytes_min = 104;
constexpr uint64_t known_incompatible = incompatible::dirty | incompatible::corrupt |
                                        incompatible::data_file | incompatible::compression |
                                        incompatible::extended_l2;
constexpr uint64_t host_bytes_max = uint64_t{1} << 56;  // host offsets have 56 bits

std::string bit_numbers(uint64_t bits) {
  std::string text;
  for (unsigned bit = 0; bit < 64; ++bit) {
    if (bits >> bit & 1) {
      text += (text.empty() ? "" : ", ") + std::to_string(bit);
    }
  }
  return text;
}

/// Turns the bytes of the first cluster into a Header, refusing whatever contradicts the format.
class HeaderParser {
 public:
  HeaderParser(const std::string &name, uint64_t file_bytes)
      : name_(name), file_bytes_(file_bytes) {}

  /// `raw` has zeros where the file is shorter than the struct.
  Result<void> parse_fields(const RawHeader &raw) {
    if (raw.magic != header_magic) {
      return bad("is not a qcow2 image");
    }
    const auto cut_short = [this] {
      return bad("ends inside its header, after " + std::to_string(file_bytes_) + " bytes");
    };
    if (file_bytes_ < version_2_header_bytes) {
      return cut_short();
    }
    header.version = raw.version;
    if (header.version != 2 && header.version != 3) {
      return fail(ErrorCode::not_supported,
                  name_ + ": is a qcow image of version " + std::to_string(header.version) +
                      ", and only 2 and 3 are supported: convert it with `qemu-img convert -O "
                      "qcow2`");
    }
    if (header.version == 3 && file_bytes_ < version_3_header_bytes_min) {
      return cut_short();
    }
    QV_TRY(parse_sizes(raw));
    if (header.version == 3) {
      QV_TRY(parse_version_3(raw));
    }
    return parse_tables(raw);
  }

  /// `cluster` is the first cluster. It is there in full, because the refcount table lies past it.
  Result<void> parse_names_and_extensions(const RawHeader &raw,
                                          std::span<const std::byte> cluster) {
    uint64_t extensions_end = cluster.size();
    const uint64_t name_offset = raw.backing_name_offset;
    const uint64_t name_bytes = raw.backing_name_bytes;
    if (name_offset != 0) {
      if (name_offset > cluster.size()) {
        return bad("its backing file name is at offset " + std::to_string(name_offset) +
                   ", outside the first cluster");
      }
      if (name_bytes > backing_name_bytes_max || name_bytes > cluster.size() - name_offset) {
        return bad("its backing file name of " + std::to_string(name_bytes) + " bytes is too long");
      }
      header.backing_name.assign(reinterpret_cast<const char *>(cluster.data()) + name_offset,
                                 name_bytes);
      extensions_end = name_offset;
    }
    return parse_extensions(cluster.first(extensions_end));
  }

  Header header;

 private:
  tl::unexpected<Error> bad(const std::string &what) const {
    return fail(ErrorCode::bad_image, name_ + ": " + what);
  }

  Result<void> parse_sizes(const RawHeader &raw) {
    const uint32_t cluster_bits = raw.cluster_bits;
    if (cluster_bits < cluster_bits_min || cluster_bits > cluster_bits_max) {
      return bad("its header says clusters of 2^" + std::to_string(cluster_bits) +
                 " bytes, and only 2^9 to 2^21 are valid");
    }
    header.geometry.cluster_bits = cluster_bits;
    header.geometry.refcount_order = 4;
    header.header_bytes = version_2_header_bytes;
    header.disk_bytes = raw.disk_bytes;
    header.crypt_method = raw.crypt_method;
    if (header.crypt_method > 2) {
      return fail(ErrorCode::not_supported, name_ + ": uses the unknown encryption method " +
                                                std::to_string(header.crypt_method));
    }
    return {};
  }

  Result<void> parse_version_3(const RawHeader &raw) {
    header.incompatible_features = raw.incompatible_features;
    header.compatible_features = raw.compatible_features;
    header.autoclear_features = raw.autoclear_features;
    if (const uint64_t unknown = header.incompatible_features & ~known_incompatible) {
      return fail(ErrorCode::not_supported,
                  name_ + ": uses incompatible features that this program does not know (bits " +
                      bit_numbers(unknown) + ")");
    }
    header.header_bytes = raw.header_bytes;
    if (header.header_bytes < version_3_header_bytes_min ||
        header.header_bytes > header.geometry.cluster_bytes()) {
      return bad("its header says that it is " + std::to_string(header.header_bytes) +
                 " bytes long, and only " + std::to_string(version_3_header_bytes_min) +
                 " bytes to one cluster are valid");
    }
    const uint32_t refcount_order = raw.refcount_order;
    if (refcount_order > refcount_order_max) {
      return bad("its header says refcounts of 2^" + std::to_string(refcount_order) +
                 " bits, and only 2^0 to 2^6 are valid");
    }
    header.geometry.refcount_order = refcount_order;
    header.geometry.extended_l2 = header.incompatible_features & incompatible::extended_l2;
    if (header.geometry.extended_l2 && header.geometry.cluster_bits < 14) {
      return bad("has extended L2 entries with clusters smaller than 16 KiB");
    }
    if (header.header_bytes > offsetof(RawHeader, compression_type)) {
      header.compression_type = raw.compression_type;
    }
    if (header.compression_type > 1) {
      return fail(ErrorCode::not_supported, name_ + ": uses the unknown compression type " +
                                                std::to_string(header.compression_type));
    }
    const bool flagged = header.incompatible_features & incompatible::compression;
    if (flagged != (header.compression_type != 0)) {
      return bad("its compression type and its compression feature bit contradict each other");
    }
    return {};
  }

  Result<void> parse_tables(const RawHeader &raw) {
    header.l1_entries = raw.l1_entries;
    header.l1_offset = HostOffset(raw.l1_offset);
    header.refcount_table_offset = HostOffset(raw.refcount_table_offset);
    header.refcount_table_clusters = raw.refcount_table_clusters;
    header.snapshot_count = raw.snapshot_count;
    header.snapshot_table_offset = HostOffset(raw.snapshot_table_offset);

    QV_TRY(
        check_table("L1 table", header.l1_offset, uint64_t{header.l1_entries} * 8, l1_bytes_max));
    const uint64_t l1_entries_needed = header.geometry.vmstate_l1_index(header.disk_bytes);
    if (header.l1_entries < l1_entries_needed) {
      return bad("its L1 table has " + std::to_string(header.l1_entries) +
                 " entries, too few for a disk of " + std::to_string(header.disk_bytes) + " bytes");
    }
    if (header.refcount_table_clusters == 0) {
      return bad("has no refcount table");
    }
    QV_TRY(check_table("refcount table", header.refcount_table_offset,
                       uint64_t{header.refcount_table_clusters} << header.geometry.cluster_bits,
                       refcount_table_bytes_max));
    if (header.snapshot_count > snapshots_max) {
      return bad("its header says " + std::to_string(header.snapshot_count) +
                 " snapshots, and at most " + std::to_string(snapshots_max) + " are valid");
    }
    // Entries have no fixed size; this is the least that so many take.
    constexpr uint64_t snapshot_entry_bytes_min = 40;
    return check_table("snapshot table", header.snapshot_table_offset,
                       header.snapshot_count * snapshot_entry_bytes_min, snapshot_table_bytes_max);
  }

  Result<void> check_table(const std::string &what, HostOffset offset, uint64_t bytes,
                           uint64_t bytes_max) const {
    if (bytes > bytes_max) {
      return bad("its " + what + " of " + std::to_string(bytes) + " bytes is larger than the " +
                 std::to_string(bytes_max) + " bytes that are valid");
    }
    if (!header.geometry.aligned(offset.value)) {
      return bad("its " + what + " at offset " + std::to_string(offset.value) +
                 " does not start at a cluster");
    }
    if (offset.value > host_bytes_max - bytes) {
      return bad("its " + what + " at offset " + std::to_string(offset.value) +
                 " is past the 2^56 bytes that a qcow2 file can have");
    }
    if (bytes == 0) {
      return {};
    }
    if (offset.value == 0) {
      return bad("its " + what + " lies in the header");
    }
    if (offset.value + bytes > file_bytes_) {
      return bad("its " + what + " ends at offset " + std::to_string(offset.value + bytes) +
                 ", but the file has only " + std::to_string(file_bytes_) +
                 " bytes: it was cut short");
    }
    return {};
  }

  Result<void> parse_extensions(std::span<const std::byte> area) {
    constexpr uint64_t extension_header_bytes = 8;  // type, length
    uint64_t position = header.header_bytes;
    while (position < area.size()) {
      if (area.size() - position < extension_header_bytes) {
        return bad(
            "its header extensions do not end where the first cluster or the backing file "
            "name does");
      }
      HeaderExtension extension;
      extension.type = load_be<uint32_t>(&area[position]);
      const uint64_t bytes = load_be<uint32_t>(&area[position + 4]);
      position += extension_header_bytes;
      if (extension.type == 0) {
        return {};
      }
      if (bytes > area.size() - position) {
        return bad("its header extension at offset " +
                   std::to_string(position - extension_header_bytes) + " says " +
                   std::to_string(bytes) + " bytes, more than there is room for");
      }
      const auto data = area.subspan(position, bytes);
      extension.data.assign(data.begin(), data.end());
      header.extensions.push_back(std::move(extension));
      position += round_up(bytes, 8);
    }
    return {};
  }

  const std::string &name_;
  uint64_t file_bytes_;
};

}  // namespace

const HeaderExtension *Header::extension(uint32_t type) const {
  const auto found = std::find_if(extensions.begin(), extensions.end(),
                                  [type](const HeaderExtension &e) { return e.type == type; });
  return found == extensions.end() ? nullptr : &*found;
}

uint32_t Header::persistent_bitmaps() const {
  // Without the autoclear bit the extension is stale, and QEMU acts as if there were none.
  const HeaderExtension *bitmaps = extension(extension_bitmaps);
  if (!(autoclear_features & autoclear::bitmaps) || !bitmaps || bitmaps->data.size() < 4) {
    return 0;
  }
  return load_be<uint32_t>(bitmaps->data.data());
}

Result<Header> read_header(io::File &file) {
  QV_ASSIGN(const uint64_t file_bytes, file.size());
  RawHeader raw;
  QV_TRY(file.read_or_zero_at(std::as_writable_bytes(std::span(&raw, 1)), HostOffset(0)));

  HeaderParser parser(file.name(), file_bytes);
  QV_TRY(parser.parse_fields(raw));
  std::vector<std::byte> cluster(parser.header.geometry.cluster_bytes());
  QV_TRY(file.read_at(cluster, HostOffset(0)));
  QV_TRY(parser.parse_names_and_extensions(raw, cluster));
  return std::move(parser.header);
}

}  // namespace qvmstate::qcow2
