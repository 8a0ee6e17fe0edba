#include "qcow2/refcount_editor.h"

#include <algorithm>
#include <cassert>

#include "qcow2/io/endian.h"
#include "qcow2/limits.h"
#include "qcow2/refcount_block.h"

namespace qvmstate::qcow2 {
namespace {

// Memory for pieces of refcount blocks: at 64 KiB clusters and 16 bits this covers 256 GiB of image
// without reading a piece twice.
constexpr uint64_t cache_bytes = 8 * mib;
constexpr uint64_t page_bytes_max = 4096;
constexpr uint64_t copy_piece_bytes = 64 * kib;
constexpr size_t freed_runs_max = 65536;  // 1 MiB; what is beyond stays allocated in the file

}  // namespace

RefcountEditor::RefcountEditor(const Image &image, Allocator &allocator)
    : image_(image),
      allocator_(allocator),
      order_(image.geometry().refcount_order),
      page_bytes_(std::min(page_bytes_max, image.geometry().cluster_bytes())),
      entries_per_page_(page_bytes_ * 8 / image.geometry().refcount_bits()),
      pages_per_block_(image.geometry().cluster_bytes() / page_bytes_),
      pages_max_(cache_bytes / page_bytes_),
      table_(image.refcount_table()),
      shadowed_(table_.size()) {}

Result<void> RefcountEditor::write_page(Page &page) {
  const uint64_t block = page.key / pages_per_block_;
  const uint64_t within = page.key % pages_per_block_ * page_bytes_;
  assert(shadowed_[block]);
  QV_TRY(image_.file().write_at(page.data, HostOffset(table_[block] + within)));
  page.dirty = false;
  return {};
}

Result<RefcountEditor::Page *> RefcountEditor::page(uint64_t key) {
  if (!pages_.empty() && pages_.front().key == key) {
    return &pages_.front();
  }
  if (auto found = page_of_.find(key); found != page_of_.end()) {
    pages_.splice(pages_.begin(), pages_, found->second);
    return &pages_.front();
  }
  Page fresh;
  if (pages_.size() >= pages_max_) {
    Page &oldest = pages_.back();
    if (oldest.dirty) {
      QV_TRY(write_page(oldest));
    }
    page_of_.erase(oldest.key);
    fresh.data = std::move(oldest.data);
    pages_.pop_back();
  }
  fresh.key = key;
  fresh.data.resize(page_bytes_);
  const uint64_t block = key / pages_per_block_;
  if (block < table_.size() && table_[block] != 0) {
    QV_TRY(image_.file().read_at(fresh.data,
                                 HostOffset(table_[block] + key % pages_per_block_ * page_bytes_)));
  } else {
    std::fill(fresh.data.begin(), fresh.data.end(), std::byte{0});
  }
  pages_.push_front(std::move(fresh));
  page_of_[key] = pages_.begin();
  return &pages_.front();
}

Result<void> RefcountEditor::shadow(uint64_t block) {
  if (block < shadowed_.size() && shadowed_[block]) {
    return {};
  }
  if (block >= refcount_table_bytes_max / 8) {
    return fail(ErrorCode::no_space,
                image_.name() + ": the refcount table would pass the size that QEMU opens");
  }
  const Geometry &geometry = image_.geometry();
  if (block >= table_.size()) {
    table_.resize(block + 1);
    shadowed_.resize(block + 1);
  }
  QV_ASSIGN(const ClusterRun copy, allocator_.take(1));
  const HostOffset to = geometry.host_offset(copy.first);
  const uint64_t old = table_[block];
  std::vector<std::byte> piece(std::min(copy_piece_bytes, geometry.cluster_bytes()));
  for (uint64_t at = 0; at < geometry.cluster_bytes(); at += piece.size()) {
    if (old != 0) {
      QV_TRY(image_.file().read_at(piece, HostOffset(old + at)));
    }
    QV_TRY(image_.file().write_at(piece, to + at));
  }
  table_[block] = to.value;
  shadowed_[block] = true;
  pending_.push_back({copy.first, true});
  if (old != 0) {
    pending_.push_back({geometry.cluster_of(HostOffset(old)), false});
  }
  return {};
}

template <class Change>
Result<void> RefcountEditor::change(uint64_t first, uint64_t count, Change change_one) {
  while (count > 0) {
    const uint64_t key = first / entries_per_page_;
    QV_TRY(shadow(key / pages_per_block_));
    QV_ASSIGN(Page * page, this->page(key));
    page->dirty = true;
    uint64_t index = first % entries_per_page_;
    const uint64_t here = std::min(count, entries_per_page_ - index);
    for (uint64_t i = 0; i < here; ++i, ++index) {
      const uint64_t before = refcount_get(page->data, order_, index);
      QV_ASSIGN(const uint64_t after, change_one(first + i, before));
      refcount_set(page->data, order_, index, after);
    }
    first += here;
    count -= here;
  }
  return {};
}

Result<void> RefcountEditor::claim_now(uint64_t first, uint64_t count, uint64_t references) {
  return change(first, count, [&](uint64_t cluster, uint64_t before) -> Result<uint64_t> {
    if (before != 0) {
      return fail(ErrorCode::bad_image, image_.name() + ": cluster " + std::to_string(cluster) +
                                            " was free and is in use now: the image is being "
                                            "changed by somebody else");
    }
    return references;
  });
}

Result<void> RefcountEditor::dereference_now(uint64_t first, uint64_t count) {
  return change(first, count, [&](uint64_t cluster, uint64_t before) -> Result<uint64_t> {
    if (before == 0) {
      return fail(ErrorCode::bad_image,
                  image_.name() + ": cluster " + std::to_string(cluster) +
                      " is in use, but its refcount is 0: the image is damaged; repair it with "
                      "`qemu-img check -r all`");
    }
    if (before == 1) {
      if (!freed_.empty() && freed_.back().end() == cluster) {
        ++freed_.back().count;
      } else if (freed_.size() < freed_runs_max) {
        freed_.push_back({cluster, 1});
      }
    }
    return before - 1;
  });
}

Result<void> RefcountEditor::settle() {
  while (!pending_.empty()) {
    const Pending next = pending_.back();
    pending_.pop_back();
    if (next.claim) {
      QV_TRY(claim_now(next.cluster, 1, 1));
    } else {
      QV_TRY(dereference_now(next.cluster, 1));
    }
  }
  return {};
}

Result<uint64_t> RefcountEditor::get(uint64_t cluster) {
  const uint64_t key = cluster / entries_per_page_;
  if (key / pages_per_block_ >= table_.size()) {
    return 0;
  }
  QV_ASSIGN(Page * page, this->page(key));
  return refcount_get(page->data, order_, cluster % entries_per_page_);
}

Result<void> RefcountEditor::reference(uint64_t first, uint64_t count, uint64_t ceiling) {
  QV_TRY(check_covered(first, count));
  QV_TRY(change(first, count, [&](uint64_t cluster, uint64_t before) -> Result<uint64_t> {
    if (before == 0) {
      return fail(ErrorCode::bad_image,
                  image_.name() + ": cluster " + std::to_string(cluster) +
                      " is in use, but its refcount is 0: the image is damaged; repair it with "
                      "`qemu-img check -r all`");
    }
    if (before >= ceiling) {
      return fail(ErrorCode::not_supported,
                  image_.name() + ": the refcount of cluster " + std::to_string(cluster) + " is " +
                      std::to_string(before) +
                      " and could not be raised for another snapshot and "
                      "its loading (refcount_bits=" +
                      std::to_string(image_.geometry().refcount_bits()) +
                      "): delete snapshots, or convert the image with `qemu-img convert -o "
                      "refcount_bits=16`");
    }
    return before + 1;
  }));
  return settle();
}

Result<void> RefcountEditor::check_covered(uint64_t first, uint64_t count) const {
  const uint64_t covered = table_.size() * pages_per_block_ * entries_per_page_;
  if (first >= covered || count > covered - first) {
    return fail(ErrorCode::bad_image,
                image_.name() + ": a table points to cluster " + std::to_string(first) +
                    ", past what the refcount table covers: the image is damaged; repair it with "
                    "`qemu-img check -r all`");
  }
  return {};
}

Result<void> RefcountEditor::dereference(uint64_t first, uint64_t count) {
  QV_TRY(check_covered(first, count));
  QV_TRY(dereference_now(first, count));
  return settle();
}

Result<void> RefcountEditor::claim(ClusterRun run, uint64_t references) {
  QV_TRY(claim_now(run.first, run.count, references));
  return settle();
}

// Table entries up to the last block: the table itself is padded with zeros to whole clusters.
uint64_t RefcountEditor::blocks_used() const {
  uint64_t used = table_.size();
  while (used > 0 && table_[used - 1] == 0) {
    --used;
  }
  return used;
}

Result<void> RefcountEditor::write_table(HostOffset offset, uint64_t clusters) {
  const uint64_t bytes = clusters * image_.geometry().cluster_bytes();
  std::vector<std::byte> piece(std::min(copy_piece_bytes, bytes));
  for (uint64_t at = 0; at < bytes; at += piece.size()) {
    for (uint64_t i = 0; i < piece.size() / 8; ++i) {
      const uint64_t index = at / 8 + i;
      store_be<uint64_t>(piece.data() + i * 8, index < table_.size() ? table_[index] : 0);
    }
    QV_TRY(image_.file().write_at(piece, offset + at));
  }
  return {};
}

Result<RefcountEditor::Table> RefcountEditor::finish() {
  const Geometry &geometry = image_.geometry();
  const Header &header = image_.header();
  QV_TRY(dereference(geometry.cluster_of(header.refcount_table_offset),
                     header.refcount_table_clusters));
  for (;;) {
    // Counting the table's own clusters may make new blocks, whose clusters may make one more: two
    // spare entries hold them in all but the smallest geometries, where the loop goes round again.
    const uint64_t clusters = std::max<uint64_t>(header.refcount_table_clusters,
                                                 geometry.clusters_for((blocks_used() + 2) * 8));
    QV_ASSIGN(const ClusterRun run, allocator_.take(clusters));
    QV_TRY(claim(run, 1));
    if (geometry.clusters_for(blocks_used() * 8) <= clusters) {
      for (Page &page : pages_) {
        if (page.dirty) {
          QV_TRY(write_page(page));
        }
      }
      QV_TRY(write_table(geometry.host_offset(run.first), clusters));
      return Table{geometry.host_offset(run.first), static_cast<uint32_t>(clusters)};
    }
    QV_TRY(dereference(run.first, run.count));
  }
}

}  // namespace qvmstate::qcow2
