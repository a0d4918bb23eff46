"""Reading model files: what a folder holds, and whether it is whole, without importing torch."""
