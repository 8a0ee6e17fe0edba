// Buffers: what they look like, and the way from free over filling and in flight back.
#include "qcow2/io/buffer_pool.h"

#include "tests/unit/io/support.h"

namespace qvmstate::io {
namespace {

TEST(BufferPool, BuffersAreAlignedSeparateAndAllThere) {
  auto pool = BufferPool::create();
  ASSERT_TRUE(pool);
  ASSERT_EQ(pool->count(), 8U);
  const auto memory = pool->memory();
  ASSERT_EQ(memory.size(), 8U);
  for (unsigned i = 0; i < 8; ++i) {
    EXPECT_EQ(pool->at(i).index, i);
    EXPECT_EQ(pool->at(i).capacity, 1'048'576U);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(pool->at(i).data) % 4096, 0U);
    EXPECT_EQ(memory[i].data(), pool->at(i).data);
    EXPECT_EQ(memory[i].size(), 1'048'576U);
    std::ranges::fill(memory[i], static_cast<std::byte>(i + 1));
  }
  for (unsigned i = 0; i < 8; ++i) {
    EXPECT_TRUE(std::ranges::all_of(
        memory[i], [i](std::byte b) { return b == static_cast<std::byte>(i + 1); }));
  }
}

TEST(BufferPool, ABufferIsFreeAgainAfterItsLastPart) {
  auto pool = BufferPool::create(2, 4096);
  ASSERT_TRUE(pool);
  Buffer *first = pool->take();
  Buffer *second = pool->take();
  ASSERT_NE(first, nullptr);
  ASSERT_NE(second, nullptr);
  EXPECT_NE(first, second);
  EXPECT_EQ(first->state, BufferState::filling);
  EXPECT_EQ(pool->take(), nullptr);

  first->used = 4096;
  pool->send_off(*first, 2);
  EXPECT_EQ(first->state, BufferState::in_flight);
  pool->part_landed(*first);
  EXPECT_EQ(first->state, BufferState::in_flight);
  EXPECT_EQ(pool->take(), nullptr);
  pool->part_landed(*first);
  EXPECT_EQ(first->state, BufferState::free);
  EXPECT_EQ(pool->take(), first);
  EXPECT_EQ(first->used, 0U);

  pool->give_back(*second);
  EXPECT_EQ(second->state, BufferState::free);
}

TEST(BufferPool, MovingKeepsTheBuffers) {
  auto created = BufferPool::create(2, 4096);
  ASSERT_TRUE(created);
  std::byte *data = created->at(1).data;
  BufferPool pool = std::move(*created);
  EXPECT_EQ(pool.at(1).data, data);
  auto other = BufferPool::create(3, 4096);
  ASSERT_TRUE(other);
  pool = std::move(*other);
  EXPECT_EQ(pool.count(), 3U);
}

TEST(BufferPool, WrongSizesAreRefused) {
  EXPECT_EQ(BufferPool::create(1, 4096).error().code, ErrorCode::bad_argument);
  EXPECT_EQ(BufferPool::create(2, 0).error().code, ErrorCode::bad_argument);
  EXPECT_EQ(BufferPool::create(2, 4095).error().code, ErrorCode::bad_argument);
  EXPECT_EQ(BufferPool::create(SIZE_MAX, 4096).error().sys_errno, ENOMEM);
  EXPECT_EQ(BufferPool::create(2, 1ULL << 62).error().sys_errno, ENOMEM);
}

using BufferPoolDeathTest = testing::Test;

TEST(BufferPoolDeathTest, ForbiddenTransitionsAbort) {
  auto pool = BufferPool::create(2, 4096);
  ASSERT_TRUE(pool);
  Buffer &buffer = pool->at(0);
  EXPECT_DEATH(pool->give_back(buffer), "free");
  EXPECT_DEATH(pool->send_off(buffer, 1), "filling");
  EXPECT_DEATH(pool->part_landed(buffer), "in_flight");
  ASSERT_EQ(pool->take(), &buffer);
  EXPECT_DEATH(pool->part_landed(buffer), "in_flight");
  EXPECT_DEATH(pool->send_off(buffer, 0), "parts");
  pool->send_off(buffer, 1);
  EXPECT_DEATH(pool->send_off(buffer, 1), "filling");
}

}  // namespace
}  // namespace qvmstate::io
