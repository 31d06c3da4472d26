"""The model: arrays in, arrays out; nothing here reads or writes files."""
