"""Arrays: conversion, checks and axes."""
