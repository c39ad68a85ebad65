"""`fastpo bench`: time, memory and error of the head and of whole steps, against others."""
