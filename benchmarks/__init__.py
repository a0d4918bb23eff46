"""Measurements that the documents quote; each asserts that a result is right before timing it."""
